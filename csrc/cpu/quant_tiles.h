// Exact integer products of many tokens on AMX's tiles. The other way round from quant_gemm.h:
//
//   C[tokens x weight rows] = X[tokens x depth] * W[weight rows x depth]^T
//
// so that a row of C is a row of the output, which is written beside the product of the rows behind
// it. A block of weight rows is packed into panels, which stay in L2 while the tokens pass; of
// those a slice of 32 stays in L1 while the panels pass.
#pragma once

#include "pool.h"
#include "quant_store.h"

#ifdef FASTRL_TILES

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kManyTokens = 4 * kPanel;  // for which a copy of the weight pays
constexpr int64_t kGroup = 32;

// Tasks of a product and the weight rows of each: packed, they fill half of L2, and threads share
// them evenly.
struct TiledTasks {
  int64_t rows, panels, count;

  TiledTasks(const QuantLinearArgs& a, int threads)
      : rows(a.weight.rows), panels(ceil_div(rows, kPanel)) {
    constexpr int64_t kBytes = 1 << 20, kMost = 64;
    const int64_t fit = ceil_div(kBytes, round_up(a.weight.columns, 64) * kPanel);
    count = round_up(ceil_div(panels, std::min(fit, kMost)), 2 * threads);
  }
  // The first row of a task.
  int64_t first(int64_t task) const { return std::min(panels * task / count * kPanel, rows); }
};

// Some tokens as [token / 32][word / 16][token / 16 % 2][token % 16][16] words: what a product
// takes one after the other lies so.
class TokenTiles {
 public:
  TokenTiles(int64_t capacity, int64_t words)
      : capacity_(capacity), words_(words), tiles_(capacity * words) {}

  // From token m on, as many as there is room for.
  void pack(const QuantLinearArgs& a, int64_t m, int threads) const {
    const int64_t width = a.weight.columns;
    parallel_for(ceil_div(count(a, m), kGroup), threads, [&](int64_t group) {
      const int64_t first = m + group * kGroup;
      auto* const to = reinterpret_cast<int8_t*>(tiles_.get() + group * kGroup * words_);
      for (int64_t t = 0; t < kGroup; ++t) {
        const auto* row = static_cast<const int8_t*>(a.x) + (first + t) * width;
        const int64_t there = first + t < a.rows ? width : 0;
        for (int64_t k = 0; k < words_ * 4; k += 64) {
          int8_t* line = to + k * kGroup + t * 64;
          const int64_t n = std::clamp<int64_t>(there - k, 0, 64);
          std::memcpy(line, row + k, n);
          std::memset(line + n, 0, 64 - n);
        }
      }
    });
  }

  int64_t count(const QuantLinearArgs& a, int64_t m) const {
    return std::min(capacity_, a.rows - m);
  }

  // 32 tokens from the first-th on.
  Rows rows(int64_t first) const {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(tiles_.get() + first * words_);
    rows.stride = 4;
    rows.sixteen = kGroup * 64;
    for (int r = 0; r < kGroup; ++r) {
      rows.row[r] = r * 64;
    }
    return rows;
  }

 private:
  const int64_t capacity_, words_;
  const Buffer<uint32_t> tiles_;
};

// A panel's sums [32 tokens][kPanel] on their way to the output, beside the product that comes
// next.
class Storing {
 public:
  Storing(const QuantLinearArgs& a, const int32_t* sums, int64_t n0, int64_t rows)
      : a_(a), sums_(sums), n0_(n0), rows_(rows) {}

  // The sums of a panel and of `tokens` tokens from m0 on are there.
  void add(int64_t panel, int64_t m0, int64_t tokens) {
    panel_ = panel;
    m0_ = m0;
    tokens_ = tokens;
  }

  // Lines that are left, some in every step of a product.
  struct Run {
    const Storing* of;
    int64_t token, end, each;

    __attribute__((always_inline)) void step() {
      for (int64_t i = 0; i < each && token < end; ++i) {
        of->store_line(token++);
      }
    }
  };

  Run begin(int64_t steps) { return {this, 0, tokens_, ceil_div(tokens_, steps)}; }

  void end(Run run) {
    while (run.token < run.end) {
      run.step();
    }
    tokens_ = 0;
  }

  void finish() { end(begin(1)); }

 private:
  __attribute__((always_inline)) void store_line(int64_t token) const {
    const int32_t* sums = sums_ + (panel_ * kGroup + token) * kPanel;
    const int64_t n = n0_ + panel_ * kPanel, left = rows_ - panel_ * kPanel;
    const float x_scale = a_.x_scale[m0_ + token];
    const int64_t size = bytes(a_.out_type);
    char* const to = static_cast<char*>(a_.out) + ((m0_ + token) * a_.weight.rows + n) * size;
    const auto output = [&](int64_t r, auto load) {
      const Vec y = (as_floats(sums + r) * x_scale) * load(a_.weight.scale + n + r);
      return a_.bias ? y + load(a_.bias + n + r) : y;
    };
    if (a_.out_type == Float::bf16 && left >= kPanel) {
      const auto all = [](const float* from) { return load(from); };
      const auto line = _mm512_cvtne2ps_pbh((__m512)output(kLanes, all), (__m512)output(0, all));
      std::memcpy(to, &line, sizeof line);
      return;
    }
    for (int64_t r = 0; r < std::min<int64_t>(left, kPanel); r += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, left - r);
      const Vec y = output(r, [&](const float* from) { return some_of(from, count); });
      store_as(y, a_.out_type, count, to + r * size);
    }
  }

  const QuantLinearArgs& a_;
  const int32_t* const sums_;
  const int64_t n0_, rows_;
  int64_t panel_ = 0, m0_ = 0, tokens_ = 0;
};

// A block of weight rows, as panels.
class WeightPanels {
 public:
  WeightPanels(const QuantLinearArgs& a, const int8_t* data, int64_t n0, int64_t rows)
      : a_(a),
        n0_(n0),
        rows_(rows),
        words_(words(a.weight.columns)),
        packed_(round_up(rows, kPanel) * words_),
        sums_(round_up(rows, kPanel) * kGroup) {
    for (int64_t r = 0; r < rows; r += kPanel) {
      pack(data + r * words_ * 4, std::min<int64_t>(kPanel, rows - r), packed_.get() + r * words_);
    }
  }

  void multiply(const TokenTiles& tokens, int64_t m0) {
    const Tiles tiles;
    Storing storing(a_, sums_.get(), n0_, rows_);
    for (int64_t m = 0; m < tokens.count(a_, m0); m += kGroup) {
      const int64_t n = std::min<int64_t>(kGroup, tokens.count(a_, m0) - m);
      multiply(tokens.rows(m), m0 + m, n, storing);
    }
    storing.finish();
  }

 private:
  void pack(const int8_t* rows, int64_t n, uint32_t* panel) const {
    const int64_t width = words_ * 4;
    for (int64_t k = 0; n == kPanel && k < width; k += 64) {
      transpose_words(rows + k, words_, kPanel, 16, panel + k / 4 * kPanel, kPanel);
    }
    if (n < kPanel) {
      pack_tokens(rows, n, width, panel);
    }
  }

  void multiply(const Rows& tokens, int64_t m0, int64_t n, Storing& storing) const {
    const int64_t panels = ceil_div(rows_, kPanel), slices = ceil_div(words_, Fours::kSteps);
    const int64_t each = round_up(ceil_div(words_, slices), 16);
    const auto run = n > 16 ? multiply_tiles<Fours, 2, 2, Storing, true>
                            : multiply_tiles<Fours, 1, 2, Storing, true>;
    for (int64_t k = 0; k < words_; k += each) {
      const int64_t count = std::min(each, words_ - k);
      Fetching ahead(tokens.data + (k + count) * 4 * kGroup, count * 4 * kGroup,
                     panels * count / 16);
      for (int64_t p = 0; p < panels; ++p) {
        run(tokens, 0, k, count, packed_.get() + p * kPanel * words_,
            sums_.get() + p * kPanel * kGroup, k == 0, ahead, storing);
        if (k + count == words_) {
          storing.add(p, m0, n);
        }
      }
    }
  }

  const QuantLinearArgs& a_;
  const int64_t n0_, rows_, words_;
  const Buffer<uint32_t> packed_;  // [panel][words][kPanel]
  const Buffer<int32_t> sums_;     // [panel][32 tokens][kPanel]
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

#endif

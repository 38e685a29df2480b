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
// takes one after the other lies so. Floats are quantized on the way.
class TokenTiles {
 public:
  TokenTiles(int64_t capacity, int64_t words)
      : capacity_(capacity), words_(words), tiles_(capacity * words), scales_(capacity) {}

  // From token m on, as many as there is room for.
  void pack(const QuantLinearArgs& a, int64_t m, int threads) const {
    const int64_t width = a.weight.columns, all = count(a, m);
    parallel_for(ceil_div(all, kGroup), threads, [&](int64_t group) {
      const RowBuffer floats(a.x_scale ? 0 : width);
      const Buffer<int8_t> bytes(words_ * 4);
      std::fill(bytes.get(), bytes.get() + words_ * 4, int8_t{0});
      for (int64_t t = 0; t < kGroup; ++t) {
        const int64_t i = group * kGroup + t;
        const int8_t* row = bytes.get();
        if (i >= all) {
          std::fill(bytes.get(), bytes.get() + width, int8_t{0});
        } else if (a.x_scale) {
          row = static_cast<const int8_t*>(a.x) + (m + i) * width;
          scales_.get()[i] = a.x_scale[m + i];
        } else {
          to_floats(row_of(a.x, a.x_type, width, m + i), a.x_type, width, floats.get());
          scales_.get()[i] = quantize_row(floats.get(), width, bytes.get());
        }
        auto* line = reinterpret_cast<int8_t*>(tiles_.get() + group * kGroup * words_) + t * 64;
        int64_t k = 0;
        for (; k + 64 <= width; k += 64, line += kGroup * 64) {
          std::memcpy(line, row + k, 64);
        }
        if (k < width) {
          std::memcpy(line, row + k, width - k);
          std::memset(line + width - k, 0, 64 - (width - k));
        }
      }
    });
  }

  const float* scales(int64_t first) const { return scales_.get() + first; }

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
  const Buffer<float> scales_;
};

// A panel's sums [32 tokens][kPanel] on their way to the output, beside the product that comes
// next.
class Storing {
 public:
  Storing(const QuantLinearArgs& a, int64_t n0, int64_t rows)
      : a_(a), n0_(n0), rows_(rows), past_(is_past(a)) {}

  // The sums of a panel and of `tokens` tokens from m0 on, with these scales, are there.
  void add(const int32_t* sums, int64_t panel, int64_t m0, const float* x_scale, int64_t tokens) {
    const int64_t n = n0_ + panel * kPanel, size = bytes(a_.out_type);
    left_ = {sums, x_scale, x_scale + tokens,
             static_cast<char*>(a_.out) + (m0 * a_.weight.rows + n) * size};
    columns_ = std::min<int64_t>(kPanel, rows_ - panel * kPanel);
    for (int64_t r = 0; r < columns_; r += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, columns_ - r);
      scale_[r / kLanes] = some_of(a_.weight.scale + n + r, count);
      bias_[r / kLanes] = a_.bias ? some_of(a_.bias + n + r, count) : Vec{};
    }
  }

  // Lines that are left, some in every step of a product: with all that they need in registers.
  struct Run {
    const int32_t* sums;
    const float *x_scale, *end;
    char* to;
    int64_t stride = 0, each = 0;
    Vec scale[2] = {}, bias[2] = {};
    bool whole = false, biased = false, bf16 = false, past = false;
    const Storing* of = nullptr;

    __attribute__((always_inline)) void step() {
      for (int64_t i = 0; i < each && x_scale < end; ++i, sums += kPanel, to += stride) {
        const float x = *x_scale++;
        if (!whole) {
          of->store_some(sums, x, to);
          continue;
        }
        Vec low = (as_floats(sums) * x) * scale[0];
        Vec high = (as_floats(sums + kLanes) * x) * scale[1];
        if (biased) {
          low += bias[0];
          high += bias[1];
        }
        if (bf16) {
          store_line((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low), to);
        } else {
          store_line((__m512i)low, to);
          store_line((__m512i)high, to + 64);
        }
      }
    }

    __attribute__((always_inline)) void store_line(__m512i line, char* at) const {
      past ? _mm512_stream_si512(reinterpret_cast<__m512i*>(at), line)
           : _mm512_storeu_si512(at, line);
    }
  };

  Run begin(int64_t steps) const {
    Run run = left_;
    run.stride = a_.weight.rows * bytes(a_.out_type);
    run.each = ceil_div(run.end - run.x_scale, steps);
    for (int i = 0; i < 2; ++i) {
      run.scale[i] = scale_[i];
      run.bias[i] = bias_[i];
    }
    run.whole = columns_ == kPanel && a_.out_type != Float::f16;
    run.biased = a_.bias != nullptr;
    run.bf16 = a_.out_type == Float::bf16;
    run.past = past_;
    run.of = this;
    return run;
  }

  void end(Run run) {
    while (run.x_scale < run.end) {
      run.step();
    }
    left_ = {};
  }

  void finish() {
    end(begin(1));
    _mm_sfence();
  }

 private:
  // Whether the output is written past the caches: it is too large to be found there, and whole
  // lines need not be read first.
  static bool is_past(const QuantLinearArgs& a) {
    constexpr int64_t kLarge = 1 << 20;
    const int64_t stride = a.weight.rows * bytes(a.out_type);
    return a.rows * stride > kLarge && stride % 64 == 0 &&
           reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
  }

  __attribute__((noinline)) void store_some(const int32_t* sums, float x_scale, char* to) const {
    for (int64_t r = 0; r < columns_; r += kLanes) {
      const Vec y = (as_floats(sums + r) * x_scale) * scale_[r / kLanes];
      store_as(a_.bias ? y + bias_[r / kLanes] : y, a_.out_type,
               std::min<int64_t>(kLanes, columns_ - r), to + r * bytes(a_.out_type));
    }
  }

  const QuantLinearArgs& a_;
  const int64_t n0_, rows_;
  const bool past_;
  Run left_ = {};
  int64_t columns_ = 0;
  Vec scale_[2] = {}, bias_[2] = {};
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
    Storing storing(a_, n0_, rows_);
    for (int64_t m = 0; m < tokens.count(a_, m0); m += kGroup) {
      const int64_t n = std::min<int64_t>(kGroup, tokens.count(a_, m0) - m);
      multiply(tokens.rows(m), m0 + m, tokens.scales(m), n, storing);
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

  // Sums of a panel that is one slice deep are stored before those of the next are made.
  void multiply(const Rows& tokens, int64_t m0, const float* x_scale, int64_t n,
                Storing& storing) const {
    const int64_t panels = ceil_div(rows_, kPanel), slices = ceil_div(words_, Fours::kSteps);
    const int64_t each = round_up(ceil_div(words_, slices), 16);
    const auto run = n > 16 ? multiply_tiles<Fours, 2, 2, Storing, true>
                            : multiply_tiles<Fours, 1, 2, Storing, true>;
    const int64_t apart = slices > 1 ? kPanel * kGroup : 0;
    for (int64_t k = 0; k < words_; k += each) {
      const int64_t count = std::min(each, words_ - k);
      Fetching ahead(tokens.data + (k + count) * 4 * kGroup, count * 4 * kGroup,
                     panels * count / 16);
      for (int64_t p = 0; p < panels; ++p) {
        run(tokens, 0, k, count, packed_.get() + p * kPanel * words_, sums_.get() + p * apart,
            k == 0, ahead, storing);
        if (k + count == words_) {
          storing.add(sums_.get() + p * apart, p, m0, x_scale, n);
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

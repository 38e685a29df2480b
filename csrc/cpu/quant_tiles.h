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

// Some tokens, 32 at a time as the rows of tiles: where they lie, if they are int8 rows of whole
// lines and spread over the sets of L1, or copied to [token / 32][word / 16][token / 16 % 2]
// [token % 16][16] words, so that a product takes one after the other. Floats are quantized there.
class TokenTiles {
 public:
  TokenTiles(const QuantLinearArgs& a, int64_t capacity)
      : a_(a),
        capacity_(capacity),
        words_(words(a.weight.columns)),
        stay_(a.x_scale && words_ * 4 == a.weight.columns &&
              (words_ <= Fours::kSteps || a.weight.columns % kHalfOfL1Sets != 0)),
        tiles_((stay_ ? kGroup : capacity) * words_),
        scales_(capacity) {}

  // Those from token m on, as many as there is room for.
  void take(int64_t m, int threads) {
    first_ = m;
    count_ = std::min(capacity_, a_.rows - m);
    if (a_.x_scale) {
      std::copy(a_.x_scale + m, a_.x_scale + m + count_, scales_.get());
    }
    const int64_t from = stay_ ? count_ / kGroup : 0;
    parallel_for(ceil_div(count_, kGroup) - from, threads,
                 [&](int64_t group) { copy((from + group) * kGroup); });
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  const float* scales(int64_t i) const { return scales_.get() + i; }

  // 32 tokens from the i-th of these on.
  Rows rows(int64_t i) const {
    const bool there = stays(i);
    Rows rows;
    rows.data = there ? row(i) : reinterpret_cast<const char*>(tiles(i));
    rows.stride = 4;
    rows.sixteen = there ? 64 : kGroup * 64;
    for (int r = 0; r < kGroup; ++r) {
      rows.row[r] = r * (there ? words_ * 4 : 64);
    }
    return rows;
  }

 private:
  // Rows so far apart are in one half of the sets, where a slice of 32 has no room.
  static constexpr int64_t kHalfOfL1Sets = 2048;

  bool stays(int64_t i) const { return stay_ && i + kGroup <= count_; }
  const char* row(int64_t i) const {
    return static_cast<const char*>(a_.x) + (first_ + i) * a_.weight.columns;
  }
  uint32_t* tiles(int64_t i) const { return tiles_.get() + (stay_ ? 0 : i * words_); }

  void copy(int64_t i) const {
    const int64_t width = a_.weight.columns;
    const RowBuffer floats(a_.x_scale ? 0 : width);
    const Buffer<int8_t> bytes(words_ * 4);
    std::fill(bytes.get(), bytes.get() + words_ * 4, int8_t{0});
    for (int64_t t = 0; t < kGroup; ++t) {
      if (i + t >= count_) {
        std::fill(bytes.get(), bytes.get() + width, int8_t{0});
      } else if (a_.x_scale) {
        std::memcpy(bytes.get(), row(i + t), width);
      } else {
        to_floats(row_of(a_.x, a_.x_type, width, first_ + i + t), a_.x_type, width, floats.get());
        scales_.get()[i + t] = quantize_row(floats.get(), width, bytes.get());
      }
      auto* line = reinterpret_cast<int8_t*>(tiles(i)) + t * 64;
      for (int64_t k = 0; k < words_ * 4; k += 64, line += kGroup * 64) {
        std::memcpy(line, bytes.get() + k, 64);
      }
    }
  }

  const QuantLinearArgs& a_;
  const int64_t capacity_, words_;
  const bool stay_;
  const Buffer<uint32_t> tiles_;
  const Buffer<float> scales_;
  int64_t first_ = 0, count_ = 0;
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
  // Whether the output is written past the caches: where it is large, and its lines would drive
  // out sums that wait in L2 for the next slice. Else that costs time, as memory that was used a
  // moment ago lies in L3.
  static bool is_past(const QuantLinearArgs& a) {
    constexpr int64_t kLarge = 12 << 20;
    const int64_t stride = a.weight.rows * bytes(a.out_type);
    return words(a.weight.columns) > Fours::kSteps && a.rows * stride > kLarge &&
           stride % 64 == 0 && reinterpret_cast<uintptr_t>(a.out) % 64 == 0;
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

  void multiply(const TokenTiles& tokens) {
    const Tiles tiles;
    Storing storing(a_, n0_, rows_);
    for (int64_t i = 0; i < tokens.count(); i += kGroup) {
      multiply(tokens, i, std::min(kGroup, tokens.count() - i), storing);
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

  // n tokens from the i-th on. Sums of a panel that is one slice deep are stored before those of
  // the next are made.
  void multiply(const TokenTiles& tokens, int64_t i, int64_t n, Storing& storing) const {
    const Rows rows = tokens.rows(i);
    const int64_t panels = ceil_div(rows_, kPanel), slices = ceil_div(words_, Fours::kSteps);
    const int64_t each = round_up(ceil_div(words_, slices), 16);
    const int64_t apart = slices > 1 ? kPanel * kGroup : 0;
    const auto run = n > 16 ? multiply_tiles<Fours, 2, 2, Storing, true>
                            : multiply_tiles<Fours, 1, 2, Storing, true>;
    for (int64_t k = 0; k < words_; k += each) {
      const int64_t count = std::min(each, words_ - k);
      // The next slice, or the next tokens; of rows that stay and are many slices long, what
      // lies there.
      Fetching ahead(rows.data + (k + count) * 4 * kGroup, count * 4 * kGroup, panels * count / 16);
      for (int64_t p = 0; p < panels; ++p) {
        int32_t* const sums = sums_.get() + p * apart;
        run(rows, 0, k, count, packed_.get() + p * kPanel * words_, sums, k == 0, ahead, storing);
        if (k + count == words_) {
          storing.add(sums, p, tokens.first() + i, tokens.scales(i), n);
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

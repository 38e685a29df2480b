// Quantized rows and exact int8 products on a CPU.
//
// A product's tasks are blocks of weight rows: a task unpacks its rows if they are 4-bit, and walks
// all tokens, kTogether panels at a time, and within those the depth in slices:
//
//   tokens, packed once   [ panel 0 | panel 1 | panel 2 | panel 3 ]  [ panel 4 ...
//   weight rows of a task [ slice 0 | slice 1 | ... ]                a slice stays in L2, one of a
//                                                                    panel in L1
//
// Sums of integers are the same in any order, so blocks may follow the number of threads.
#include "quant.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "pages.h"
#include "pool.h"
#include "quant_few.h"
#include "quant_gemm.h"
#include "quant_rows.h"
#include "quant_store.h"
#include "quant_tiles.h"
#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // of tokens at a time
constexpr int64_t kRowsBytes = 64 << 10;    // of activations that are worth a task

// work(buffer, row) for every row, in tasks that share a buffer of `buffers` rows.
template <class Work>
void for_rows(int64_t rows, int64_t width, int buffers, int threads, const Work& work) {
  const int64_t each = std::max<int64_t>(kRowsBytes / (4 * width), 1);
  const int64_t padded = round_up(width, kSixteen);
  parallel_for(ceil_div(rows, each), threads, [&](int64_t task) {
    RowBuffer buffer(padded * buffers);
    for (int b = 0; b < buffers; ++b) {
      std::fill(buffer.get() + b * padded + width, buffer.get() + (b + 1) * padded, 0.0f);
    }
    for (int64_t r = task * each; r < std::min(rows, (task + 1) * each); ++r) {
      work(buffer.get(), buffer.get() + (buffers - 1) * padded, r);
    }
  });
}

// g / (1 + e^-g), or with GELU's tanh written as an exponential g / (1 + e^(-2 u)). The same bits
// on all instruction sets, and where e would be above e^80 as with that: off by 2e-35 |g|.
template <bool Gelu>
Vec gate(Vec g) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  Vec x = -g;
  if constexpr (Gelu) {
    x = g * (1.0f + 0.044715f * (g * g)) * -kTwice;
  }
  x = at_most(at_least(x, splat(kLowest)), splat(80.0f));
  return g / (1.0f + exp_from_lowest(x, fma_once));
}

// gate(g) * up of a row; `to` has room for whole vectors.
template <Float type, bool Gelu>
void gate_row(const char* g, const char* up, int64_t width, float* to) {
  constexpr int64_t kSize = type == Float::f32 ? 4 : 2;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    store(to + k, gate<Gelu>(load_as<type>(g + k * kSize)) * load_as<type>(up + k * kSize));
  }
  if (k < width) {
    float last[2][kLanes] = {};
    to_floats(g + k * kSize, type, width - k, last[0]);
    to_floats(up + k * kSize, type, width - k, last[1]);
    store(to + k, gate<Gelu>(load(last[0])) * load(last[1]));
  }
}

template <bool Gelu>
auto gate_row_of(Float type) {
  return type == Float::f32    ? gate_row<Float::f32, Gelu>
         : type == Float::bf16 ? gate_row<Float::bf16, Gelu>
                               : gate_row<Float::f16, Gelu>;
}

// 128 times the sum of a weight row of `depth` bytes, for shifted tokens.
[[maybe_unused]] int32_t shift_of(const int8_t* row, int64_t depth) {
#if defined(__AVX512VNNI__)
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += 64) {
    sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(row + k));
  }
  int32_t lanes[16];
  std::memcpy(lanes, &sums, sizeof lanes);
  return 128 * std::accumulate(lanes, lanes + 16, int32_t{0});
#else
  return 128 * std::accumulate(row, row + depth, int32_t{0});
#endif
}

// The product of one block of weight rows with tokens.
class Block {
 public:
  Block(const QuantLinearArgs& a, int64_t n0, int64_t rows)
      : a_(a), n0_(n0), depth_(round_up(a.weight.columns, 64)), rows_(rows) {
    const QuantWeight& w = a.weight;
    if (w.scheme == QuantWeight::Scheme::int8) {
      data_ = reinterpret_cast<const int8_t*>(w.data) + n0 * w.stride;
    } else {
      unpack();
    }
    for (int64_t r = 0; kShifted && a.rows > kFew && r < rows; ++r) {
      start_[r] = -shift_of(data_ + r * depth_, depth_);
    }
  }

  // The tokens [m0, m0 + tokens), packed from `panels` on; at most kTogether panels of them.
  void multiply(const uint32_t* panels, int64_t m0, int64_t tokens) {
    const int64_t count = ceil_div(tokens, kPanel);
    sum_panels(panels, count, vectors(tokens - (count - 1) * kPanel));
    for (int64_t p = 0; p < count; ++p) {
      const int64_t first = m0 + p * kPanel, n = std::min<int64_t>(kPanel, m0 + tokens - first);
      float scale[kPanel] = {};
      std::copy(a_.x_scale + first, a_.x_scale + first + n, scale);
      store_panel(a_, sums(p), n0_, rows_, first, n, scale);
    }
  }

#if defined(__AVX2__)
  // All tokens, widened; they are at most kFew.
  void multiply(const Token* x) {
    multiply_few(data_, rows_, depth_, x, a_.rows, sums(0));
    float scale[kPanel] = {};
    std::copy(a_.x_scale, a_.x_scale + a_.rows, scale);
    store_panel(a_, sums(0), n0_, rows_, 0, a_.rows, scale);
  }
#endif

#ifdef FASTRL_TILES
  void multiply_tiles(const TokenTiles& tokens) {
    WeightPanels(a_, data_, n0_, rows_).multiply(tokens);
  }
#endif

 private:
  static int vectors(int64_t tokens) {
    const auto n = static_cast<int>(ceil_div(tokens, kLanes));
    return n > 2 ? kVectors : n;
  }

  int32_t* sums(int64_t panel) const { return sums_.get() + panel * kWeightRows * kPanel; }

  void unpack() {
    unpacked_ = std::make_unique<Buffer<int8_t>>(rows_ * depth_);
    data_ = unpacked_->get();
    const FourBit four(a_.weight);
    for (int64_t r = 0; r < rows_; ++r) {
      int8_t* to = unpacked_->get() + r * depth_;
      four.rounded_row(n0_ + r, 1.0f / a_.weight.scale[n0_ + r], to);
      std::memset(to + a_.weight.columns, 0, depth_ - a_.weight.columns);
    }
  }

#ifdef FASTRL_TILES

  void sum_panels(const uint32_t* panel, int64_t, int vectors) {
    const EvenRows rows = {reinterpret_cast<const char*>(data_), depth_};
    stream_words(rows, static_cast<int>(rows_), words(depth_), {panel, kPanel, vectors},
                 reinterpret_cast<float*>(sums(0)));
  }

#else

  void sum_panels(const uint32_t* panels, int64_t count, int last) {
    const int64_t all = words(depth_);
    const int64_t slice = kDepth == 4 && count == 1 && last == 1 ? all : kWords;
    for (int64_t k = 0; k < all; k += slice) {
      const int64_t steps = std::min(slice, all - k);
      WeightRows rows = slice_of(k, steps);
      rows.start = k == 0 ? start_ : nullptr;
      for (int64_t p = 0; p < count; ++p) {
        multiply_slice(rows, steps, panels + (p * all + k) * kPanel,
                       p + 1 < count ? kVectors : last, sums(p));
      }
    }
  }

  WeightRows slice_of(int64_t k, [[maybe_unused]] int64_t steps) {
    const int8_t* from = data_ + k * kDepth;
    if constexpr (kDepth == 4) {
      return {reinterpret_cast<const char*>(from), depth_, rows_, nullptr};
    } else {
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t i = 0; i < steps * 2; ++i) {
          wide_[r * kWords * 2 + i] = from[r * depth_ + i];
        }
      }
      return {reinterpret_cast<const char*>(wide_.get()), kWords * 4, rows_, nullptr};
    }
  }

  Buffer<int16_t> wide_{kDepth == 2 ? kWeightRows * kWords * 2 : 0};

#endif

  const QuantLinearArgs& a_;
  const int64_t n0_, depth_, rows_;
  const int8_t* data_ = nullptr;  // [rows, depth]
  std::unique_ptr<Buffer<int8_t>> unpacked_;
  Buffer<int32_t> sums_{kTogether * kWeightRows * kPanel};  // [panel][kWeightRows][kPanel]
  int32_t start_[kWeightRows] = {};
};

// Enough blocks for the threads to share evenly; few tokens take rows that stay in L2.
int64_t rows_in_block(const QuantLinearArgs& a, int threads) {
  const int64_t even = round_up(ceil_div(a.weight.rows, 4 * threads), 48);
  return a.rows <= kPanel ? 48 : std::min(even, kWeightRows);
}

#ifdef FASTRL_TILES
void multiply_in_tiles(const QuantLinearArgs& a, int threads) {
  const int64_t depth = round_up(a.weight.columns, 64);
  const int64_t most = std::max<int64_t>(kPackedBytes / depth / kGroup, 1) * kGroup;
  const TiledTasks tasks(a, threads);
  TokenTiles tokens(a, std::min(round_up(a.rows, kGroup), most));
  for (int64_t m = 0; m < a.rows; m += most) {
    tokens.take(m, threads);
    parallel_for(tasks.count, threads, [&](int64_t t) {
      if (const int64_t rows = tasks.first(t + 1) - tasks.first(t)) {
        Block(a, tasks.first(t), rows).multiply_tiles(tokens);
      }
    });
  }
}
#endif

// The pages of a large output, which may have been mapped a moment ago: lines that are written past
// the caches cost twice as much where each page is a fault.
void make_output(const QuantLinearArgs& a, int threads) {
  constexpr int64_t kPiece = 2 << 20;
  const int64_t stride = a.weight.rows * bytes(a.out_type);
  const int64_t each = std::max<int64_t>(kPiece / stride, 1);
  if (a.rows * stride >= kMappedAfresh) {
    parallel_for(ceil_div(a.rows, each), threads, [&](int64_t piece) {
      const int64_t first = piece * each;
      make_rows(a.out, a.rows, stride, first, std::min(each, a.rows - first));
    });
  }
}

void quantize_first(QuantLinearArgs a, int threads) {
  const Buffer<int8_t> x(a.rows * a.weight.columns);
  const Buffer<float> scale(a.rows);
  quantize_rows({a.rows, a.weight.columns, a.x_type, a.x, x.get(), scale.get(), nullptr}, threads);
  a.x = x.get();
  a.x_scale = scale.get();
  quantized_linear(a, threads);
}

}  // namespace

void quantize_rows(const QuantRowsArgs& a, int threads) {
  for_rows(a.rows, a.width, 1, threads, [&](float* x, float*, int64_t r) {
    to_floats(row_of(a.x, a.type, a.width, r), a.type, a.width, x);
    int8_t* to = a.data + r * a.width;
    a.scale[r] = quantize_row(x, a.width, to);
    if (a.sum) {
      a.sum[r] = std::accumulate(to, to + a.width, int32_t{0});
    }
  });
}

void rmsnorm_quant(const RmsnormQuantArgs& args, int threads) {
  const QuantRowsArgs& a = args.at;
  for_rows(a.rows, a.width, 2, threads, [&](float* x, float* other, int64_t r) {
    to_floats(row_of(a.x, a.type, a.width, r), a.type, a.width, x);
    if (args.residual) {
      to_floats(row_of(args.residual, a.type, a.width, r), a.type, a.width, other);
      for (int64_t k = 0; k < a.width; ++k) {
        x[k] += other[k];
      }
      auto* sum = const_cast<char*>(row_of(args.new_residual, a.type, a.width, r));
      from_floats(x, a.type, a.width, sum);
      to_floats(sum, a.type, a.width, x);
    }
    rmsnorm_row(x, a.width, args.weight, args.reciprocal_width, args.eps);
    a.scale[r] = quantize_row(x, a.width, a.data + r * a.width);
  });
}

void glu_quant(const GluQuantArgs& args, int threads) {
  const QuantRowsArgs& a = args.at;
  const auto gate = args.gelu ? gate_row_of<true>(a.type) : gate_row_of<false>(a.type);
  for_rows(a.rows, a.width, 1, threads, [&](float* x, float*, int64_t r) {
    gate(row_of(a.x, a.type, a.width, r), row_of(args.up, a.type, a.width, r), a.width, x);
    a.scale[r] = quantize_row(x, a.width, a.data + r * a.width);
  });
}

void pool_score(const PoolScoreArgs& a, int threads) {
  const int64_t padded = round_up(a.width, kSixteen);
  for_rows(a.rows, a.width, 1, threads, [&](float* x, float*, int64_t r) {
    to_floats(row_of(a.hidden, a.type, a.width, a.last[r]), a.type, a.width, x);
    rmsnorm_row(x, a.width, a.weight, a.reciprocal_width, a.eps);
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* head = a.head + h * padded;
      const float sum = lane_sum(a.width, [&](int64_t k) { return load(x + k) * load(head + k); });
      a.score[r * a.heads + h] = a.bias ? sum + a.bias[h] : sum;
    }
  });
}

void quantized_linear(const QuantLinearArgs& a, int threads) {
  if (a.rows == 0) {
    return;
  }
  make_output(a, threads);
#ifdef FASTRL_TILES
  if (a.rows >= kManyTokens) {
    return multiply_in_tiles(a, threads);
  }
#endif
  if (!a.x_scale) {
    return quantize_first(a, threads);
  }
  const int64_t width = a.weight.columns, all = words(width), group = kTogether * kPanel;
  const int64_t most = std::max<int64_t>(kPackedBytes / (all * 4) / group, 1) * group;
  const int64_t chunk = std::min(round_up(a.rows, kPanel), most);
  const int64_t block = rows_in_block(a, threads);
#if defined(__AVX2__)
  if (a.rows <= kFew) {
    const int64_t depth = round_up(width, 64);
    const Buffer<Token> x(round_up(a.rows, kTileTokens) * depth);
    widen_tokens(static_cast<const int8_t*>(a.x), a.rows, width, depth, x.get());
    return parallel_for(ceil_div(a.weight.rows, block), threads, [&](int64_t b) {
      Block(a, b * block, std::min(block, a.weight.rows - b * block)).multiply(x.get());
    });
  }
#endif
  const Buffer<uint32_t> packed(chunk * all);
  for (int64_t m = 0; m < a.rows; m += chunk) {
    const int64_t tokens = std::min(chunk, a.rows - m);
    parallel_for(ceil_div(tokens, kPanel), threads, [&](int64_t p) {
      const int64_t first = p * kPanel, n = std::min<int64_t>(kPanel, tokens - first);
      const auto* x = static_cast<const int8_t*>(a.x) + (m + first) * width;
      pack_tokens(x, n, width, packed.get() + first * all);
    });
    parallel_for(ceil_div(a.weight.rows, block), threads, [&](int64_t b) {
      Block weights(a, b * block, std::min(block, a.weight.rows - b * block));
      for (int64_t i = 0; i < tokens; i += group) {
        weights.multiply(packed.get() + i * all, m + i, std::min(group, tokens - i));
      }
    });
  }
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

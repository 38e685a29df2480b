// Both products of the backward with few tokens, bit for bit those of gemm.h, in one pass over rows
// of the weight, in the namespace of the instruction set being compiled:
//
//   grad_weight [rows, H] = G hidden      grad_hidden [tokens, H] += G^T weight
//
// kAcross columns of kTile rows of the weight, and of those rows of grad_weight, are in registers
// while the tokens pass by: each number of G is broadcast once and multiplied twice. The weight is
// read where it lies, right after G was computed, and grad_weight is written once.
#pragma once

#include "pack.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int kTile = 4;  // rows
constexpr int kAcross = (kLanes == 16 ? 2 : 1) * kLanes;
constexpr int kAhead = 64;  // columns further on, what comes next is asked for
// Of tokens and of sums, floats that a block's tiles meet one after another: they stay in L1.
constexpr int kNear = 8192;
static_assert(kPanel % kAcross == 0 && kBlock % kTile == 0 && Floats::kSteps % kTile == 0 &&
              kLanes % kTile == 0);

// Tokens, or their sums, in panels of their own: [H / kAcross][token][kAcross].
inline void pack_token(const void* from, Float type, int64_t width, int64_t tokens, float* to) {
  const auto* x = static_cast<const char*>(from);
  for (int64_t h = 0; h < width; h += kAcross, to += tokens * kAcross) {
    const int64_t n = std::min<int64_t>(kAcross, width - h);
    to_floats(x + h * bytes(type), type, n, to);
    std::fill(to + n, to + kAcross, 0.0f);
  }
}

// The gradients z[row][token] of a block's logits, of a panel of tokens, as the products read them:
// [row / kTile][token][kTile], with `stride` tokens in all.
inline void tile_gradients(const float* z, int rows, int64_t tokens, int64_t stride, float* to) {
  for (int64_t at = 0; at < tokens; at += kLanes) {
    for (int r0 = 0; r0 < rows; r0 += kLanes) {
      Vec tile[kLanes] = {};
      for (int i = 0; i < std::min(kLanes, rows - r0); ++i) {
        tile[i] = load(z + (r0 + i) * kPanel + at);
      }
      transpose(tile);
      for (int i = 0; i < std::min<int64_t>(kLanes, tokens - at); ++i) {
        float row[kLanes];
        store(row, tile[i]);
        for (int part = 0; part < kLanes; part += kTile) {
          std::memcpy(to + (r0 + part) * stride + (at + i) * kTile, row + part, kTile * 4);
        }
      }
    }
  }
}

// `panels` of columns of R rows of the weight and of grad_weight, and of the sums of grad_hidden.
template <int R, bool kWeight, bool kHidden>
__attribute__((noinline)) void both_tile(const float* weight, int64_t stride, const float* g,
                                         int64_t tokens, int64_t panels, const float* hidden,
                                         float* sums, float* grad_weight, int64_t grad_stride) {
  constexpr int V = kAcross / kLanes;
  for (; panels > 0; --panels, weight += kAcross, grad_weight += kAcross) {
    Vec w[R][V], grad[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        if (kHidden) {
          __builtin_prefetch(weight + r * stride + kAhead + j * kLanes);
        }
        if (kWeight) {
          __builtin_prefetch(grad_weight + r * grad_stride + kAhead + j * kLanes, 1);
        }
        w[r][j] = kHidden ? load(weight + r * stride + j * kLanes) : Vec{};
        grad[r][j] = splat(0.0f);
      }
    }
    const float* of_token = g;
    for (int64_t t = 0; t < tokens; ++t, of_token += kTile, hidden += kAcross, sums += kAcross) {
      Vec x[V], sum[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        x[j] = kWeight ? load(hidden + j * kLanes) : Vec{};
        sum[j] = kHidden ? load(sums + j * kLanes) : Vec{};
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec factor = splat(of_token[r]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          sum[j] = kHidden ? fma(factor, w[r][j], sum[j]) : sum[j];
          grad[r][j] = kWeight ? fma(factor, x[j], grad[r][j]) : grad[r][j];
        }
      }
#pragma GCC unroll 4
      for (int j = 0; kHidden && j < V; ++j) {
        store(sums + j * kLanes, sum[j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; kWeight && r < R; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        store(grad_weight + r * grad_stride + j * kLanes, grad[r][j]);
      }
    }
  }
}

// A problem's operands. Nothing is read or written of a gradient that is null.
struct FewTokens {
  int64_t tokens, width;
  const float* hidden;  // as pack_token packs
  const char* weight;
  int64_t weight_stride;  // bytes
  Float weight_type;
  char* grad_weight;  // contiguous, in weight_type
};

// A chunk's sums of grad_hidden, in panels as the tokens: of kSteps rows, 0 where they start, and
// of all rows so far.
struct ChunkSums {
  float *sums, *all;
};

// Rows [v0, v0 + n) of the weight, which are `at` and following of `rows` in their chunk; G as
// tile_gradients leaves it.
template <bool kWeight, bool kHidden>
void multiply_both(const FewTokens& p, const float* g, int64_t v0, int64_t n, int64_t at,
                   int64_t rows, const ChunkSums& sums) {
  const int64_t size = bytes(p.weight_type), fit = std::max<int64_t>(kNear / (2 * p.tokens), 1);
  const int64_t most = round_up(std::min<int64_t>(fit, kPanel), kAcross);
  alignas(64) float weights[kTile * kPanel], grads[kTile * kPanel];
  for (int64_t h = 0, columns; h < p.width; h += columns) {
    const bool as_stored = p.weight_type == Float::f32 && h + kAcross <= p.width;
    columns = as_stored ? std::min(round_up(fit, kAcross), (p.width - h) / kAcross * kAcross)
                        : std::min(most, p.width - h);
    const int64_t panels = ceil_div(columns, kAcross);
    const float* hidden = p.hidden + h * p.tokens;
    float* sum = sums.sums + h * p.tokens;
    for (int64_t r = 0, tile; r < n; r += tile) {
      tile = r + kTile <= n ? kTile : 1;
      const auto run =
          tile == 1 ? both_tile<1, kWeight, kHidden> : both_tile<kTile, kWeight, kHidden>;
      const float* from_g = g + r / kTile * kTile * p.tokens + r % kTile;
      const char* from = p.weight + (v0 + r) * p.weight_stride + h * size;
      char* to = p.grad_weight + ((v0 + r) * p.width + h) * size;
      if (as_stored) {
        run(reinterpret_cast<const float*>(from), p.weight_stride / 4, from_g, p.tokens, panels,
            hidden, sum, reinterpret_cast<float*>(to), p.width);
      } else {
        for (int64_t i = 0; kHidden && i < tile; ++i) {
          for (int64_t line = 0; line < columns; line += 64 / size) {
            __builtin_prefetch(from + i * p.weight_stride + (columns + line) * size, 0, 2);
          }
          float* row = weights + i * kPanel;
          to_floats(from + i * p.weight_stride, p.weight_type, columns, row);
          std::fill(row + columns, row + panels * kAcross, 0.0f);
        }
        run(weights, kPanel, from_g, p.tokens, panels, hidden, sum, grads, kPanel);
        for (int64_t i = 0; kWeight && i < tile; ++i) {
          from_floats(grads + i * kPanel, p.weight_type, columns, to + i * p.width * size);
        }
      }
      const int64_t done = at + r + tile;
      if (kHidden && (done % Floats::kSteps == 0 || done == rows)) {
        float* all = sums.all + h * p.tokens;
        for (int64_t i = 0; i < p.tokens * panels * kAcross; i += kLanes) {
          const Vec x = load(sum + i);
          store(all + i, done <= Floats::kSteps ? x : load(all + i) + x);
          store(sum + i, splat(0.0f));
        }
      }
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Products of gemm.h, bit for bit, with rows of A that lie evenly: weights, read from memory once.
// A row is then reached from one address and multiples of the stride, which fit in registers where
// kRows or more addresses do not, and the rows that come next are asked for ahead of time. Rows of
// 16-bit numbers can become floats on the way, a few at a time, where the nearest cache holds them.
#pragma once

#include <type_traits>

#include "convert.h"
#include "gemm.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Rows lie `stride` bytes apart and are contiguous in depth.
struct EvenRows {
  const char* data;
  int64_t stride;
};

// multiply_tile, which see; rows `ahead` further on are asked for.
template <class Kind, int R, int V>
__attribute__((noinline)) void stream_tile(const char* a, int64_t stride, int64_t ahead,
                                           int64_t steps, const typename Kind::Element* panel,
                                           float* c, bool first) {
  using Element = typename Kind::Element;
  static_assert(R <= 12);
  constexpr int64_t kLine = 64 / Kind::kBytes;
  const int64_t three = 3 * stride, five = 5 * stride, seven = 7 * stride;
  const float* b = reinterpret_cast<const float*>(panel);
  Vec sum[R][V];  // in registers, as long as every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sum[r][j] = splat(0.0f);
    }
  }
  for (int64_t k = 0; k < steps; ++k, a += Kind::kBytes, b += kPanel) {
    if (k % kLine == 0) {
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(a + (ahead + r) * stride);
      }
    }
    Vec x[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      x[j] = load(b + j * kLanes);
    }
    const char* ninth = a + 9 * stride;
    const char* const rows[12] = {a,
                                  a + stride,
                                  a + 2 * stride,
                                  a + three,
                                  a + 4 * stride,
                                  a + five,
                                  a + 2 * three,
                                  a + seven,
                                  a + 8 * stride,
                                  ninth,
                                  ninth + stride,
                                  ninth + 2 * stride};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto* element = reinterpret_cast<const Element*>(rows[r]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        sum[r][j] = Kind::multiply_add(element, x[j], sum[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = c + r * kPanel + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

// Tiles of R rows as long as there are so many, then smaller ones.
template <class Kind, int R, int V>
void stream_rows(const EvenRows& a, int r, int rows, int64_t k, int64_t steps, int64_t ahead,
                 const typename Kind::Element* panel, float* c) {
  for (; r + R <= rows; r += R) {
    stream_tile<Kind, R, V>(a.data + r * a.stride + k * Kind::kBytes, a.stride, ahead, steps,
                            panel + k * kPanel, c + r * kPanel, k == 0);
  }
  if constexpr (R > 1) {
    stream_rows<Kind, (R > 4 ? 4 : R / 2), V>(a, r, rows, k, steps, ahead, panel, c);
  }
}

template <class Kind, int V>
void stream_panel(const EvenRows& a, int rows, int64_t steps, const typename Kind::Element* panel,
                  float* c) {
  constexpr int64_t kSteps = Kind::kSteps;
  constexpr int kTile = std::min(2 * kRows, kVectors * kRows / V);  // of rows, in the registers
  if (V == 1) {  // few columns: each row of A streams through once
    for (int r = 0; r < rows; r += kTile) {
      for (int64_t k = 0; k < steps; k += kSteps) {
        stream_rows<Kind, kTile, V>(a, r, std::min(r + kTile, rows), k, std::min(kSteps, steps - k),
                                    kTile, panel, c);
      }
    }
    return;
  }
  for (int64_t k = 0; k < steps; k += kSteps) {  // many: a slice of the panel stays in L1
    stream_rows<Kind, kTile, V>(a, 0, rows, k, std::min(kSteps, steps - k), kBlock, panel, c);
  }
}

// C[rows x kPanel] = A * panel, for at most kBlock rows, with the bits of multiply. Rows beyond the
// last one are not read.
template <class Kind>
void multiply_streamed(const EvenRows& a, int rows, int64_t steps,
                       const typename Kind::Element* panel, int vectors, float* c) {
#ifdef FASTRL_TILES
  if constexpr (std::is_same_v<Kind, Pairs>) {  // tiles sum otherwise
    Rows all;
    all.data = a.data;
    all.stride = 4;
    for (int r = 0; r < kBlock; ++r) {
      all.row[r] = std::min(r, rows - 1) * a.stride;
    }
    return multiply<Kind>(all, rows, steps, panel, vectors, c);
  }
#endif
  if (vectors == 1) {
    stream_panel<Kind, 1>(a, rows, steps, panel, c);
  } else if (vectors == 2) {
    stream_panel<Kind, 2>(a, rows, steps, panel, c);
  } else if (kVectors > 3 && vectors == 3) {
    stream_panel<Kind, std::min(3, kVectors)>(a, rows, steps, panel, c);
  } else {
    stream_panel<Kind, kVectors>(a, rows, steps, panel, c);
  }
}

template <int R, int V>
void convert_rows(const EvenRows& a, Float type, int rows, int64_t steps, const float* panel,
                  float* c) {
  constexpr int64_t kSteps = Floats::kSteps;
  alignas(64) float floats[R * kSteps];
  for (int r0 = 0; r0 < rows; r0 += R) {
    for (int64_t k = 0; k < steps; k += kSteps) {
      const int64_t count = std::min(kSteps, steps - k);
      for (int r = 0; r < R; ++r) {
        const char* from = a.data + std::min(r0 + r, rows - 1) * a.stride + k * 2;
        for (int64_t line = 0; line < 2 * count; line += 64) {
          __builtin_prefetch(from + R * a.stride + line);
        }
        to_floats(from, type, count, floats + r * kSteps);
      }
      stream_tile<Floats, R, V>(reinterpret_cast<const char*>(floats), kSteps * 4, 0, count,
                                panel + k * kPanel, c + r0 * kPanel, k == 0);
    }
  }
}

// The same for rows of a 16-bit type, as if they had been floats, and two vectors or more.
inline void multiply_converted(const EvenRows& a, Float type, int rows, int64_t steps,
                               const float* panel, int vectors, float* c) {
  if (vectors == 2) {
    convert_rows<kRows, 2>(a, type, rows, steps, panel, c);
  } else {
    convert_rows<kRows, kVectors>(a, type, rows, steps, panel, c);
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

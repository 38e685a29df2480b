// Products of gemm.h, bit for bit, with rows of A that lie evenly: weights, read from memory once.
// A row is then reached from one address and multiples of the stride, which fit in registers where
// kRows or more addresses do not, and the rows that come next are asked for ahead of time. Rows of
// 16-bit numbers can become floats on the way, a few at a time, where the nearest cache holds them.
#pragma once

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
  constexpr int64_t kLine = 64 / sizeof(Element);
  const int64_t three = 3 * stride, five = 5 * stride, seven = 7 * stride;
  const float* b = reinterpret_cast<const float*>(panel);
  Vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sum[r][j] = splat(0.0f);
    }
  }
  for (int64_t k0 = 0; k0 < steps; k0 += kLine) {
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(a + (ahead + r) * stride);
    }
    for (int64_t k = k0; k < std::min(k0 + kLine, steps); ++k, a += 4, b += kPanel) {
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

template <class Kind, int R, int V>
void stream_rows(const EvenRows& a, int rows, int64_t steps, const typename Kind::Element* panel,
                 float* c) {
  constexpr int64_t kSteps = Kind::kSteps;
  const auto tile = [&](int r, int64_t k, int64_t ahead) {
    stream_tile<Kind, R, V>(a.data + r * a.stride + k * 4, a.stride, ahead,
                            std::min(kSteps, steps - k), panel + k * kPanel, c + r * kPanel,
                            k == 0);
  };
  if (V == 1) {  // few columns: each row of A streams through once
    for (int r = 0; r < rows; r += R) {
      for (int64_t k = 0; k < steps; k += kSteps) {
        tile(r, k, R);
      }
    }
    return;
  }
  for (int64_t k = 0; k < steps; k += kSteps) {  // many: a slice of the panel stays in L1
    for (int r = 0; r < rows; r += R) {
      tile(r, k, kBlock);
    }
  }
}

// C[rows x kPanel] = A * panel, for at most kBlock rows, with the bits of multiply. Rows beyond the
// last one are not read.
template <class Kind>
void multiply_streamed(const EvenRows& a, int rows, int64_t steps,
                       const typename Kind::Element* panel, int vectors, float* c) {
#ifdef FASTRL_TILES
  const int whole = Kind::kStep == 2 ? 0 : rows / (2 * kRows) * (2 * kRows);  // tiles sum otherwise
#else
  const int whole = rows / (2 * kRows) * (2 * kRows);
#endif
  if (whole > 0) {
    if (vectors == 1) {
      stream_rows<Kind, 2 * kRows, 1>(a, whole, steps, panel, c);
    } else if (vectors == 2) {
      stream_rows<Kind, kRows, 2>(a, whole, steps, panel, c);
    } else {
      stream_rows<Kind, kRows, kVectors>(a, whole, steps, panel, c);
    }
  }
  if (whole < rows) {
    Rows rest;
    rest.data = a.data;
    rest.stride = 4;
    for (int r = 0; r < kBlock; ++r) {
      rest.row[r] = std::min(whole + r, rows - 1) * a.stride;
    }
    multiply<Kind>(rest, rows - whole, steps, panel, vectors, c + whole * kPanel);
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

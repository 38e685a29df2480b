// Products of a small block of rows with packed panels: the matrix arithmetic of the CPU kernels,
// in the namespace of the instruction set being compiled.
//
//   C[rows x tokens] += A[rows x depth] * B[depth x tokens]
//
// A is read where it lies, one scalar (or one pair of bf16) broadcast at a time, so weights need no
// copy. B is packed into panels of kPanel columns, a column per lane, so that what follows a
// product (a maximum over the rows, say) runs down the rows without crossing lanes. The depth is
// summed in blocks of kDepth, each from zero and in order: an element of C has the same bits
// whatever block, panel or batch it is computed in.
//
// Two kinds: floats; or bf16 pairs, two neighbours in depth side by side in 32 bits, whose products
// the CPU sums in float (AVX-512 BF16).
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Vectors per panel, chosen with kRows so that a tile of C stays in registers.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kRows = 6;
constexpr int kBlock = 48;   // rows of A taken together; a multiple of 2 kRows
constexpr int kDepth = 256;  // elements of depth summed from zero

// One element of A or B as it is stored: a float, or a pair of bf16 as 32 bits.
struct Floats {
  using Element = float;
  static constexpr int kStep = 1;  // elements of depth in one
  static inline Vec multiply_add(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint32_t;
  static constexpr int kStep = 2;
  static inline Vec multiply_add(const uint32_t* a, Vec b, Vec c) {
    int32_t bits;  // a row may start at any even address
    std::memcpy(&bits, a, sizeof bits);
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }
};
#endif

// Where the rows of A are: element k of row r at data + row[r] + k * stride, counted in bytes, as
// rows of bf16 may lie at odd multiples of half an Element.
struct Rows {
  const char* data;
  int64_t row[kBlock];
  int64_t stride;
};

// R x V vectors of C from `steps` Elements of depth, stored if first, else added.
template <class Kind, int R, int V>
inline void multiply_tile(const Rows& a, int r0, int64_t k0, int64_t steps,
                          const typename Kind::Element* panel, float* c, bool first) {
  using Element = typename Kind::Element;
  const char* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = a.data + a.row[r0 + r] + k0 * a.stride;
  }
  Vec sum[R][V] = {};
  const float* b = reinterpret_cast<const float*>(panel) + k0 * kPanel;
  for (int64_t k = 0; k < steps; ++k, b += kPanel) {
    Vec x[V];
    for (int j = 0; j < V; ++j) {
      x[j] = load(b + j * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const auto* element = reinterpret_cast<const Element*>(rows[r] + k * a.stride);
      for (int j = 0; j < V; ++j) {
        sum[r][j] = Kind::multiply_add(element, x[j], sum[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < V; ++j) {
      float* to = c + (r0 + r) * kPanel + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

// C[kBlock x kPanel] = A * panel for `rows` rows (a multiple of 2 kRows is computed), the first
// `vectors` of the panel's vectors, and `steps` Elements of depth.
template <class Kind>
void multiply(const Rows& a, int rows, int64_t steps, const typename Kind::Element* panel,
              int vectors, float* c) {
  constexpr int64_t kSteps = kDepth / Kind::kStep;
  if (vectors == 1) {  // few columns: each row of A streams through once
    for (int r = 0; r < rows; r += 2 * kRows) {
      for (int64_t k = 0; k < steps; k += kSteps) {
        multiply_tile<Kind, 2 * kRows, 1>(a, r, k, std::min(kSteps, steps - k), panel, c, k == 0);
      }
    }
    return;
  }
  for (int64_t k = 0; k < steps; k += kSteps) {  // many: a slice of the panel stays in L1
    const int64_t count = std::min(kSteps, steps - k);
    for (int r = 0; r < rows; r += kRows) {
      if (vectors == 2) {
        multiply_tile<Kind, kRows, 2>(a, r, k, count, panel, c, k == 0);
      } else {
        multiply_tile<Kind, kRows, kVectors>(a, r, k, count, panel, c, k == 0);
      }
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// The end of a quantized product: sums of [weight rows x tokens] become rows of the output.
#pragma once

#include "convert.h"
#include "gemm.h"
#include "quant.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

inline Vec as_floats(const int32_t* from) {
  IVec sums;
  std::memcpy(&sums, from, sizeof sums);
  return __builtin_convertvector(sums, Vec);
}

inline Vec as_floats(const float* from) { return load(from); }

inline Vec some_of(const float* from, int64_t count) {
  float lanes[kLanes] = {};
  std::copy(from, from + count, lanes);
  return load(lanes);
}

// Writes out[m0 + i, n0 + r] for the first `tokens` of a panel and the first `rows` of its weight
// rows; sums[r][kPanel], readable up to a multiple of kLanes rows, and x_scale[kPanel]. A token's
// outputs are written one after the other.
template <class Sum>
void store_panel(const QuantLinearArgs& a, const Sum* sums, int64_t n0, int64_t rows, int64_t m0,
                 int64_t tokens, const float* x_scale) {
  const int64_t out_rows = a.weight.rows, size = bytes(a.out_type);
  for (int64_t i = 0; i < tokens; i += kLanes) {
    const int64_t present = std::min<int64_t>(kLanes, tokens - i);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, rows - r);
      const Vec scale = some_of(a.weight.scale + n0 + r, count);
      const Vec bias = a.bias ? some_of(a.bias + n0 + r, count) : Vec{};
      Vec y[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        y[j] = as_floats(sums + (r + j) * kPanel + i);
      }
      transpose(y);
      char* to = static_cast<char*>(a.out) + ((m0 + i) * out_rows + n0 + r) * size;
      for (int64_t t = 0; t < present; ++t, to += out_rows * size) {
        Vec out = (y[t] * x_scale[i + t]) * scale;
        out = a.bias ? out + bias : out;
        store_as(out, a.out_type, count, to);
      }
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

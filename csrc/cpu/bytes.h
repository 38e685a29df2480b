// Products in int8 of rows of a weight that are read from memory once: activations are quantized as
// panels, a row and its scale per lane, and the sums of integers are exact: a few rows of
// activations lie one after the other and are multiplied as quant_few.h does. The same numbers as
// kernels/quant/reference.py.
#pragma once

#include "quant_few.h"
#include "quant_rows.h"
#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

struct Int8 {
  using OfFloats = Floats;
  static constexpr int kStep = kDepth;
};

#if defined(__AVX2__)
constexpr int64_t kFewRows = 4;  // with eight, panels are faster
#else
constexpr int64_t kFewRows = 0;
#endif

// Of a panel, of so many rows in all.
inline int64_t tokens_of(int64_t rows) { return rows <= kFewRows ? rows : kPanel; }

// Words of `tokens` rows, [tokens][words], or, if that is kPanel, a panel.
struct BytePanel : PanelView<uint32_t> {
  const float* scale;  // [kPanel]
};

// A panel of words has as many columns as its vectors, but tiles are cut from whole ones.
inline int64_t word_columns([[maybe_unused]] int vectors) {
#ifdef FASTRL_TILES
  return kPanel;
#else
  return vectors * kLanes;
#endif
}

// A vector of rows [depth], `columns` floats apart, as quantize_row does it: scale = max |x| / 127,
// NaN where there is no number; words `to_columns` apart.
inline void quantize_lanes(const float* from, int64_t columns, int64_t depth, uint32_t* to,
                           int64_t to_columns, float* scale) {
  IVec highest = {};
  for (int64_t k = 0; k < depth; ++k) {
    const IVec bits = as_int(load(from + k * columns)) & 0x7fffffff;
    highest = bits > highest ? bits : highest;
  }
  const IVec number = highest < 0x7f800000;
  const Vec step = at_least(as_float(highest) * (1.0f / 127.0f), splat(kSmallestScale));
  store(scale, select(number, step, splat(std::numeric_limits<float>::quiet_NaN())));
  const Vec inverse = select(number, 1.0f / step, Vec{});
  for (int64_t k = 0; k < depth; k += kDepth, to += to_columns) {
    IVec word = {};
    for (int64_t i = 0; i < std::min<int64_t>(kDepth, depth - k); ++i) {
      const Vec x = select(number, load(from + (k + i) * columns), Vec{});
      const IVec q = as_int(x * inverse + kRounder) - as_int(splat(kRounder));
      word |= (q & (kDepth == 4 ? 0xff : 0xffff)) << (32 / kDepth * static_cast<int>(i));
    }
    word ^= kShifted ? INT32_MIN + 0x808080 : 0;
    std::memcpy(to, &word, sizeof word);
  }
}

// The same of a few rows, one after the other from `to` on, as multiply_few reads them.
inline void quantize_few([[maybe_unused]] const float* from, [[maybe_unused]] int64_t columns,
                         [[maybe_unused]] int64_t depth, [[maybe_unused]] int64_t rows,
                         [[maybe_unused]] uint32_t* to, [[maybe_unused]] float* scale) {
#if defined(__AVX2__)
  const int64_t count = words(depth);
  const uint32_t flip = sizeof(Token) == 1 && !kShifted ? 0x80808080u : 0;
  const Buffer<uint32_t> lanes(count * kLanes);
  std::fill_n(lanes.get() + ceil_div(depth, kDepth) * kLanes,
              (count - ceil_div(depth, kDepth)) * kLanes, 0u);
  quantize_lanes(from, columns, depth, lanes.get(), kLanes, scale);
  for (int64_t t = 0; t < round_up(rows, kTileTokens); ++t) {
    for (int64_t k = 0; k < count; ++k, ++to) {
      *to = t < rows ? lanes[k * kLanes + t] ^ flip : 0;
    }
  }
#endif
}

// z[n, kPanel] = rows [r0, r0 + n) of a weight, `stride` bytes each, times a panel.
inline void multiply_int8(const void* weight, int64_t stride, const Int8Rows& w, int64_t r0, int n,
                          int64_t depth, const BytePanel& panel, float* z) {
  const char* rows = static_cast<const char*>(weight) + r0 * stride;
  const bool few = panel.tokens <= kFewRows;
  if (few) {
    for (int r = 0; r < n; ++r) {
      store(z + r * kPanel, Vec{});  // lanes that are no row's
    }
#if defined(__AVX2__)
    multiply_few(reinterpret_cast<const int8_t*>(rows), n, stride,
                 reinterpret_cast<const Token*>(panel.data), panel.tokens,
                 reinterpret_cast<int32_t*>(z));
#endif
  } else {
    stream_words({rows, stride}, n, words(depth), panel, z);
  }
  for (int r = 0; r < n; ++r) {
    const int32_t shift = kShifted && !few ? 128 * w.sum[r0 + r] : 0;
    for (int j = 0; j < panel.vectors * kLanes; j += kLanes) {
      float* at = z + r * kPanel + j;
      const Vec sum = __builtin_convertvector(as_int(load(at)) - shift, Vec);
      store(at, sum * load(panel.scale + j) * w.scale[r0 + r]);
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Quantized weights as floats: dequantize, and products that are taken in bf16 or of e4m3 values.
//
// A block of weight rows is decoded to floats (to bf16, where the CPU multiplies that) and
// multiplied by gemm.h with packed tokens, whose order of summation depends on the depth alone.
#include <algorithm>
#include <array>
#include <cmath>

#include "gemm.h"
#include "pack.h"
#include "pool.h"
#include "quant.h"
#include "quant_rows.h"
#include "quant_store.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kPackedBytes = 16 << 20;  // of tokens at a time

// float8_e4m3fn: 4 bits of exponent with bias 7, no infinity, NaN where all other bits are set.
std::array<float, 256> e4m3_values() {
  std::array<float, 256> values;
  for (int i = 0; i < 256; ++i) {
    const int exponent = i >> 3 & 15, fraction = i & 7;
    const float size = exponent ? std::ldexp(8.0f + fraction, exponent - 10)
                                : std::ldexp(static_cast<float>(fraction), -9);
    values[i] = (i & 127) == 127 ? std::numeric_limits<float>::quiet_NaN() : i < 128 ? size : -size;
  }
  return values;
}

void e4m3_to_floats(const uint8_t* from, int64_t n, float* to) {
  static const std::array<float, 256> values = e4m3_values();
  for (int64_t i = 0; i < n; ++i) {
    to[i] = values[from[i]];
  }
}

// Row n as floats; e4m3 values without their scale.
void weight_row(const QuantWeight& w, int64_t n, float* to) {
  switch (w.scheme) {
    case QuantWeight::Scheme::four_bit:
      return FourBit(w).row(n, to);
    case QuantWeight::Scheme::fp8:
      return e4m3_to_floats(w.data + n * w.stride, w.columns, to);
    case QuantWeight::Scheme::int8: {
      const auto* q = reinterpret_cast<const int8_t*>(w.data) + n * w.stride;
      std::copy(q, q + w.columns, to);
    }
  }
}

void round_to_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = bf16_to_float(float_to_bf16(x[i]));
  }
}

// A row of floats that bf16 holds exactly, as Elements of a product; 0 behind it.
inline void to_elements(Floats, const float* from, int64_t n, float* to) {
  std::copy(from, from + n, to);
}

#ifdef FASTRL_PAIRS
inline void to_elements(Pairs, const float* from, int64_t n, uint32_t* to) {
  to[(n - 1) / 2] = 0;
  from_floats(from, Float::bf16, n, to);
}
using Kind = Pairs;
#else
using Kind = Floats;
#endif
using Element = Kind::Element;

class Product {
 public:
  Product(const QuantLinearArgs& a, int threads)
      : a_(a), threads_(threads), steps_(ceil_div(a.weight.columns, Kind::kStep)) {}

  void run() const {
    const int64_t most = std::max<int64_t>(kPackedBytes / (steps_ * 4) / kPanel, 1) * kPanel;
    const int64_t chunk = std::min(round_up(a_.rows, kPanel), most);
    const Buffer<Element> packed(chunk * steps_);
    for (int64_t m = 0; m < a_.rows; m += chunk) {
      const int64_t tokens = std::min(chunk, a_.rows - m);
      parallel_for(ceil_div(tokens, kPanel), threads_, [&](int64_t p) {
        pack(m + p * kPanel, std::min<int64_t>(kPanel, tokens - p * kPanel),
             packed.get() + p * kPanel * steps_);
      });
      parallel_for(ceil_div(a_.weight.rows, kBlock), threads_,
                   [&](int64_t b) { block(b * kBlock, packed.get(), m, tokens); });
    }
  }

 private:
  bool fp8() const { return a_.weight.scheme == QuantWeight::Scheme::fp8; }

  void pack(int64_t m, int64_t tokens, Element* panel) const {
    const int64_t width = a_.weight.columns;
    const Buffer<float> row(width);
    const Buffer<Element> elements(steps_);
    for (int64_t i = 0; i < kPanel; ++i) {
      if (i < tokens && fp8()) {
        e4m3_to_floats(static_cast<const uint8_t*>(a_.x) + (m + i) * width, width, row.get());
      } else if (i < tokens) {
        to_floats(static_cast<const uint16_t*>(a_.x) + (m + i) * width, Float::bf16, width,
                  row.get());
      } else {
        std::fill(row.get(), row.get() + width, 0.0f);
      }
      to_elements(Kind(), row.get(), width, elements.get());
      for (int64_t k = 0; k < steps_; ++k) {
        panel[k * kPanel + i] = elements[k];
      }
    }
  }

  void block(int64_t n0, const Element* packed, int64_t m, int64_t tokens) const {
    const int64_t width = a_.weight.columns, n = std::min<int64_t>(kBlock, a_.weight.rows - n0);
    const Buffer<Element> weights(kBlock * steps_);
    const Buffer<float> row(width), sums(kBlock * kPanel);
    Rows rows;
    rows.data = reinterpret_cast<const char*>(weights.get());
    rows.stride = sizeof(Element);
    for (int64_t r = 0; r < kBlock; ++r) {
      rows.row[r] = std::min(r, n - 1) * steps_ * sizeof(Element);
      if (r < n) {
        weight_row(a_.weight, n0 + r, row.get());
        if (!fp8()) {
          round_to_bf16(row.get(), width);
        }
        to_elements(Kind(), row.get(), width, weights.get() + r * steps_);
      }
    }
    for (int64_t p = 0; p < tokens; p += kPanel) {
      const int64_t count = std::min<int64_t>(kPanel, tokens - p);
      const auto vectors = static_cast<int>(ceil_div(count, kLanes));
      multiply<Kind>(rows, static_cast<int>(n), steps_, packed + p * steps_,
                     vectors > 2 ? kVectors : vectors, sums.get());
      float scale[kPanel];
      std::fill(scale, scale + kPanel, 1.0f);
      if (a_.x_scale) {
        std::copy(a_.x_scale + m + p, a_.x_scale + m + p + count, scale);
      }
      store_panel(a_, sums.get(), n0, n, m + p, count, scale);
    }
  }

  const QuantLinearArgs& a_;
  const int threads_;
  const int64_t steps_;
};

}  // namespace

void dequantized_linear(const QuantLinearArgs& a, int threads) { Product(a, threads).run(); }

void dequantize(const DequantizeArgs& a, int threads) {
  const QuantWeight& w = a.weight;
  const bool scaled = w.scheme != QuantWeight::Scheme::four_bit;
  const int64_t each = std::max<int64_t>((64 << 10) / w.columns, 1);
  parallel_for(ceil_div(w.rows, each), threads, [&](int64_t task) {
    const Buffer<float> row(w.columns);
    for (int64_t n = task * each; n < std::min(w.rows, (task + 1) * each); ++n) {
      weight_row(w, n, row.get());
      for (int64_t k = 0; scaled && k < w.columns; ++k) {
        row[k] *= w.scale[n];
      }
      from_floats(row.get(), a.out_type, w.columns,
                  static_cast<char*>(a.out) + n * w.columns * bytes(a.out_type));
    }
  });
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

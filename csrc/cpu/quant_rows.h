// Rows of floats to int8 and rows of 4-bit weights to floats, in the namespace of the instruction
// set.
#pragma once

#include <cmath>

#include "lanes.h"
#include "quant.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126

// 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low bits.
constexpr float kRounder = 12582912.0f;

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

inline const char* row_of(const void* data, Float type, int64_t width, int64_t r) {
  return static_cast<const char*>(data) + r * width * bytes(type);
}

// Room for a row that is processed 16 floats at a time; what lies behind the row is 0.
class RowBuffer {
 public:
  explicit RowBuffer(int64_t width) : floats_(round_up(width, kSixteen)) {
    std::fill(floats_.get() + width, floats_.get() + round_up(width, kSixteen), 0.0f);
  }
  float* get() const { return floats_.get(); }

 private:
  Buffer<float> floats_;
};

// to[k] = rint(x[k] * inverse); |x[k] * inverse| must be below 2^22. x is padded to 16 floats.
inline void round_row(const float* x, int64_t width, float inverse, int8_t* to) {
  int64_t k = 0;
  const auto rounded = [&](int64_t at) {
    const IVec bits = as_int(load(x + at) * inverse + kRounder);
    return __builtin_convertvector(bits - as_int(splat(kRounder)), Bytes);
  };
  for (; k + kLanes <= width; k += kLanes) {
    const Bytes q = rounded(k);
    std::memcpy(to + k, &q, sizeof q);
  }
  if (k < width) {
    const Bytes q = rounded(k);
    std::memcpy(to + k, &q, width - k);
  }
}

// Quantizes a row, padded as above; returns its scale, NaN where it holds a NaN or an infinity.
inline float quantize_row(const float* x, int64_t width, int8_t* to) {
  IVec highest = {};  // of magnitudes as integers: ordered like the floats, NaN above infinity
  for (int64_t k = 0; k < width; k += kLanes) {
    const IVec bits = as_int(load(x + k)) & 0x7fffffff;
    highest = bits > highest ? bits : highest;
  }
  int32_t bits = 0;
  for (int j = 0; j < kLanes; ++j) {
    bits = std::max<int32_t>(bits, highest[j]);
  }
  if (bits > 0x7f7fffff) {
    std::memset(to, 0, width);
    return std::numeric_limits<float>::quiet_NaN();
  }
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  const float scale = std::max(absmax * (1.0f / 127.0f), kSmallestScale);
  round_row(x, width, 1.0f / scale, to);
  return scale;
}

// x = (x / sqrt(mean(x^2) + eps)) * weight
inline void rmsnorm_row(float* x, int64_t width, const float* weight, float reciprocal_width,
                        float eps) {
  const float squares = lane_sum(width, [&](int64_t k) {
    const Vec v = load(x + k);
    return v * v;
  });
  const float inverse = 1.0f / std::sqrt(squares * reciprocal_width + eps);
  for (int64_t k = 0; k < width; ++k) {
    x[k] = (x[k] * inverse) * weight[k];
  }
}

// Where a weight's 4-bit element i lies, and what it is worth.
class FourBit {
 public:
  explicit FourBit(const QuantWeight& w) : w_(w) {}

  // Row n as floats.
  void row(int64_t n, float* to) const {
    const int64_t first = n * w_.stride;
    for (int64_t k = 0; k < w_.columns;) {
      const int64_t block = (first + k) / w_.block;
      const int64_t end = std::min((block + 1) * w_.block - first, w_.columns);
      const float absmax = this->absmax(block);
      for (; k < end && (first + k) % 2 != 0; ++k) {
        to[k] = value(first + k) * absmax;
      }
      for (; k + kSixteen <= end; k += kSixteen) {
        sixteen(w_.data + (first + k) / 2, absmax, to + k);
      }
      for (; k < end; ++k) {
        to[k] = value(first + k) * absmax;
      }
    }
  }

  // rint(inverse * row n), as round_row of `row` gives it: a block has 16 values, rounded once.
  void rounded_row(int64_t n, float inverse, int8_t* to) const {
    const int64_t first = n * w_.stride;
    for (int64_t k = 0; k < w_.columns;) {
      const int64_t block = (first + k) / w_.block;
      const int64_t end = std::min((block + 1) * w_.block - first, w_.columns);
      alignas(16) int8_t table[16];
      float values[16];
      const Vec absmax = splat(this->absmax(block));
      for (int j = 0; j < kSixteen; j += kLanes) {
        store(values + j, load(w_.code + j) * absmax);
      }
      round_row(values, 16, inverse, table);
      for (; k < end && (first + k) % 2 != 0; ++k) {
        to[k] = table[index(first + k)];
      }
#if defined(__AVX2__)
      const __m128i all = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
      const __m128i low = _mm_set1_epi8(15);
      for (; k + 32 <= end; k += 32) {
        const __m128i both =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(w_.data + (first + k) / 2));
        const __m128i even = _mm_and_si128(_mm_srli_epi16(both, 4), low);
        const __m128i odd = _mm_and_si128(both, low);
        auto* out = reinterpret_cast<__m128i*>(to + k);
        _mm_storeu_si128(out, _mm_shuffle_epi8(all, _mm_unpacklo_epi8(even, odd)));
        _mm_storeu_si128(out + 1, _mm_shuffle_epi8(all, _mm_unpackhi_epi8(even, odd)));
      }
#endif
      for (; k < end; ++k) {
        to[k] = table[index(first + k)];
      }
    }
  }

 private:
  float absmax(int64_t block) const {
    if (w_.nested_absmax == nullptr) {
      return static_cast<const float*>(w_.absmax)[block];
    }
    const float code = w_.nested_code[static_cast<const uint8_t*>(w_.absmax)[block]];
    return code * w_.nested_absmax[block / 256] + *w_.nested_offset;
  }

  int index(int64_t i) const {
    const uint8_t both = w_.data[i / 2];
    return i % 2 == 0 ? both >> 4 : both & 15;
  }

  float value(int64_t i) const { return w_.code[index(i)]; }

  // 16 elements from 8 bytes.
  void sixteen(const uint8_t* from, float absmax, float* to) const {
#if defined(__AVX2__)
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    const __m128i low = _mm_set1_epi8(15);
    const __m128i index =
        _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), low), _mm_and_si128(both, low));
#endif
#if defined(__AVX512F__)
    // With masks of all lanes: the plain intrinsics warn of the operand that they leave undefined.
    const __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, index);
    const __m512 values = _mm512_maskz_permutexvar_ps(0xffff, wide, _mm512_loadu_ps(w_.code));
    _mm512_storeu_ps(to, _mm512_mul_ps(values, _mm512_set1_ps(absmax)));
#elif defined(__AVX2__)
    const __m256 below = _mm256_loadu_ps(w_.code), above = _mm256_loadu_ps(w_.code + 8);
    const auto eight = [&](__m128i bytes, float* out) {
      const __m256i i = _mm256_cvtepu8_epi32(bytes);
      const __m256 values =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, i), _mm256_permutevar8x32_ps(above, i),
                           _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
      _mm256_storeu_ps(out, _mm256_mul_ps(values, _mm256_set1_ps(absmax)));
    };
    eight(index, to);
    eight(_mm_srli_si128(index, 8), to + 8);
#else
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = w_.code[from[i] >> 4] * absmax;
      to[2 * i + 1] = w_.code[from[i] & 15] * absmax;
    }
#endif
  }

  const QuantWeight& w_;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Rows of float, bf16 or fp16 to float and back, in the namespace of the instruction set.
#pragma once

#include "float.h"
#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t bytes(Float type) { return type == Float::f32 ? 4 : 2; }

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : bits >> 16 | 0x40);
}

// fp16 without conversion instructions: through the exponent, exact for every finite value.
inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  x *= 5.192296858534828e+33f;  // 2^112: from fp16's bias to float's
  std::memcpy(&bits, &x, sizeof bits);
  if ((half & 0x7c00) == 0x7c00) {
    bits = 0x7f800000 | static_cast<uint32_t>(half & 0x3ff) << 13;
  }
  bits |= sign;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t float_to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) {
    return sign | 0x7e00;
  }
  if (bits >= 0x477ff000) {  // rounds beyond 65504
    return sign | 0x7c00;
  }
  if (bits < 0x38800000) {  // subnormal: let an addition round it
    float y;
    std::memcpy(&y, &bits, sizeof y);
    y += 0.5f;
    std::memcpy(&bits, &y, sizeof bits);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits += 0xfff + (bits >> 13 & 1) - (112u << 23);
  return sign | static_cast<uint16_t>(bits >> 13);
}

// A vector of numbers.
template <Float type>
inline Vec load_as(const char* from) {
  if constexpr (type == Float::f32) {
    return load(reinterpret_cast<const float*>(from));
  }
#if defined(__AVX512F__) && FASTRL_MAX_LANES >= 16
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return type == Float::bf16
             ? (Vec)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, halves), 16)
             : (Vec)_mm512_maskz_cvtph_ps(0xffff, halves);
#elif defined(__AVX2__) && FASTRL_MAX_LANES >= 8
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return type == Float::bf16 ? (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)
                             : (Vec)_mm256_cvtph_ps(halves);
#else
  uint16_t halves[kLanes];
  std::memcpy(halves, from, sizeof halves);
  Vec x;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = type == Float::bf16 ? bf16_to_float(halves[i]) : f16_to_float(halves[i]);
  }
  return x;
#endif
}

inline void to_floats(const void* from, Float type, int64_t n, float* to) {
  if (type == Float::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  const auto* x = static_cast<const uint16_t*>(from);
  if (type == Float::bf16) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = bf16_to_float(x[i]);
    }
    return;
  }
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#endif
  for (; i < n; ++i) {
    to[i] = f16_to_float(x[i]);
  }
}

inline void from_floats(const float* from, Float type, int64_t n, void* to) {
  if (type == Float::f32) {
    std::memcpy(to, from, n * sizeof(float));
    return;
  }
  auto* y = static_cast<uint16_t*>(to);
  int64_t i = 0;
  if (type == Float::bf16) {
#if defined(__AVX512BF16__)
    for (; i + 16 <= n; i += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      std::memcpy(y + i, &rounded, sizeof rounded);
    }
#endif
    for (; i < n; ++i) {
      y[i] = float_to_bf16(from[i]);
    }
    return;
  }
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) {
    y[i] = float_to_f16(from[i]);
  }
}

// The first n of a vector.
inline void store_as(Vec x, Float type, int64_t n, char* to) {
  if (type == Float::f32 && n == kLanes) {
    return store(reinterpret_cast<float*>(to), x);
  }
#if defined(__AVX512BF16__)
  if (type == Float::bf16 && n == kLanes && kLanes == 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &rounded, sizeof rounded);
    return;
  }
#endif
  float floats[kLanes];
  store(floats, x);
  from_floats(floats, type, n, to);
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Gumbel noise that is a pure function of (seed, position, vocabulary entry), in the namespace of
// the instruction set being compiled.
//
//   stream = splitmix64(seed + (position + 1) golden)
//   bits = splitmix64(stream + (entry + 1) golden) >> 32
//   gumbel = -log(-log(1 - u)),  u = (bits + 1/2) / 2^32
//
// The logarithms are rarely needed: z + gumbel can beat a perturbed logit `best` only if
// u <= -log(1 - u) <= e^(z - best).
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrl {
namespace FASTRL_ISA {
namespace {

typedef uint64_t Wide __attribute__((vector_size(sizeof(Vec))));  // half as many lanes
typedef uint32_t Bits __attribute__((vector_size(sizeof(Vec))));

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

template <class T>
inline T splitmix64(T x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline uint64_t noise_stream(int64_t seed, int64_t position) {
  return splitmix64(static_cast<uint64_t>(seed) + (static_cast<uint64_t>(position) + 1) * kGolden);
}

inline uint64_t noise_step(int64_t entry) { return (static_cast<uint64_t>(entry) + 1) * kGolden; }

inline uint32_t noise_bits(uint64_t stream, int64_t entry) {
  return static_cast<uint32_t>(splitmix64(stream + noise_step(entry)) >> 32);
}

// The bits of one entry for a vector of streams: those of even lanes, then those of odd ones.
inline Bits noise_bits(const uint64_t* streams, int64_t entry) {
  Wide even, odd;
  std::memcpy(&even, streams, sizeof even);
  std::memcpy(&odd, streams + kLanes / 2, sizeof odd);
  even = splitmix64(even + noise_step(entry)) >> 32;
  odd = splitmix64(odd + noise_step(entry)) & 0xFFFFFFFF00000000;
  return (Bits)(even | odd);  // little-endian: an odd lane of 32 bits is the upper half of 64
}

// In float as in the reference, with both logarithms rounded correctly.
inline float gumbel(uint32_t bits) {
  const float u = std::min((static_cast<float>(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  const float exponential = static_cast<float>(-std::log1p(-static_cast<double>(u)));
  return static_cast<float>(-std::log(static_cast<double>(exponential)));
}

// A little below u.
inline float about_uniform(uint32_t bits) {
  return static_cast<float>(static_cast<int32_t>(bits >> 1)) * 0x1p-31f;
}
inline Vec about_uniform(Bits bits) {
  return __builtin_convertvector((IVec)(bits >> 1), Vec) * 0x1p-31f;
}

// Below `best` by more than all rounding on the way to a comparison with it.
inline float below(float best) { return best - (2e-5f + 0x1p-22f * std::fabs(best)); }

inline bool any(IVec where) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)where, (__m512i)where) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)where, (__m256i)where);
#else
  Wide halves;
  std::memcpy(&halves, &where, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

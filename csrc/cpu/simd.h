// Vectors of the instruction set being compiled, in its namespace: GCC's and Clang's vector types,
// so that one source serves all of them. Only +, -, *, comparisons and shuffles, in the order
// written (the build has -ffp-contract=off): every instruction set computes the same bits. The
// exceptions are `fma` and what is made of it, which round once where the CPU can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(FASTRL_EMULATE_AMX)
#include "emulated_bf16.h"  // the tests', for machines without these instructions
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrl {
namespace FASTRL_ISA {
namespace {  // a file may ask for fewer lanes than another: nothing here is shared between them

#ifndef FASTRL_MAX_LANES
#define FASTRL_MAX_LANES 16
#endif
#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX2__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif
constexpr int kLanes = kNativeLanes < FASTRL_MAX_LANES ? kNativeLanes : FASTRL_MAX_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Less a zero, which changes no x: added to one, -0 becomes 0, so that compilers have to add, and a
// broadcast that a load does for nothing takes two of the instructions that multiply.
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline IVec as_int(Vec v) {
  IVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline Vec as_float(IVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline Vec select(IVec where, Vec a, Vec b) { return where ? a : b; }

// NaN in x stays NaN, as in torch.clamp.
inline Vec at_least(Vec x, Vec limit) {
#if defined(__AVX512F__) && FASTRL_MAX_LANES >= 16
  // x where either is NaN; the plain intrinsic warns of the operand that it leaves undefined.
  return (Vec)_mm512_mask_max_ps((__m512)x, 0xffff, (__m512)limit, (__m512)x);
#elif defined(__AVX2__) && FASTRL_MAX_LANES >= 8
  return (Vec)_mm256_max_ps((__m256)limit, (__m256)x);
#else
  return select(x < limit, limit, x);
#endif
}

inline Vec at_most(Vec x, Vec limit) {
#if defined(__AVX512F__) && FASTRL_MAX_LANES >= 16
  return (Vec)_mm512_mask_min_ps((__m512)x, 0xffff, (__m512)limit, (__m512)x);
#elif defined(__AVX2__) && FASTRL_MAX_LANES >= 8
  return (Vec)_mm256_min_ps((__m256)limit, (__m256)x);
#else
  return select(limit < x, limit, x);
#endif
}

// a b + c
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__) && FASTRL_MAX_LANES >= 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && FASTRL_MAX_LANES >= 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a b + c, rounded once everywhere.
inline Vec fma_once(Vec a, Vec b, Vec c) {
#if defined(__AVX2__)
  return fma(a, b, c);
#else
  for (int i = 0; i < kLanes; ++i) {
    c[i] = std::fma(a[i], b[i], c[i]);
  }
  return c;
#endif
}

// Rounded correctly everywhere.
inline Vec sqrt(Vec x) {
#if defined(__AVX512F__) && FASTRL_MAX_LANES >= 16
  return (Vec)_mm512_mask_sqrt_ps((__m512)x, 0xffff, (__m512)x);
#elif defined(__AVX2__) && FASTRL_MAX_LANES >= 8
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) {
    x[i] = std::sqrt(x[i]);
  }
  return x;
#endif
}

template <int... J>
inline Vec shuffle(Vec x, Vec y, std::integer_sequence<int, J...>) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(x, y, J...);
#else
  return __builtin_shuffle(x, y, IVec{J...});
#endif
}

template <int... J>
inline Vec shift_in(Vec x, float last, std::integer_sequence<int, J...>) {
  return shuffle(x, splat(last), std::integer_sequence<int, J + 1 ...>());
}

// x without its first lane, and `last` behind it.
inline Vec shift_in(Vec x, float last) {
  return shift_in(x, last, std::make_integer_sequence<int, kLanes>());
}

template <int Block, int... J>
inline void swap_blocks(Vec& x, Vec& y, std::integer_sequence<int, J...>) {
  const Vec low =
      shuffle(x, y, std::integer_sequence<int, (J & Block ? J - Block + kLanes : J)...>());
  y = shuffle(x, y, std::integer_sequence<int, (J & Block ? J + kLanes : J + Block)...>());
  x = low;
}

// Transposes kLanes rows in place. A step swaps the off-diagonal blocks of each 2 Block x 2 Block
// tile:
//   | a b |      | a c |
//   | c d |  ->  | b d |
template <int Block = 1>
inline void transpose(Vec (&rows)[kLanes]) {
  if constexpr (Block < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if ((i & Block) == 0) {
        swap_blocks<Block>(rows[i], rows[i + Block], std::make_integer_sequence<int, kLanes>());
      }
    }
    transpose<2 * Block>(rows);
  }
}

// e^x within 2 ulp; inf and 0 beyond the range of float, NaN for NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, a Taylor polynomial for e^r, then 2^n in two factors so
// that results below the smallest normal number keep what float can hold.
inline Vec exp(Vec x) {
  x = select(x > splat(89.0f), splat(89.0f), x);
  x = select(x < splat(-104.0f), splat(-104.0f), x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * (r * r) + r) + 1.0f;
  const IVec whole = as_int(shifted) - as_int(splat(kRound)), half = whole >> 1;
  return (p * as_float((half + 127) << 23)) * as_float((whole - half + 127) << 23);
}

// e^x within 2 ulp for x from kLowest to 80, or 4 where x is large, 1 for 0, NaN for NaN, never
// subnormal. A third of the work of exp.
constexpr float kLowest = -86.0f;

template <class MultiplyAdd>
Vec exp_from_lowest(Vec x, MultiplyAdd fma) {
  constexpr float kRound = 12582912.0f;
  const Vec shifted = fma(x, splat(1.44269504f), splat(kRound));
  const Vec r = fma(shifted - kRound, splat(-0.693147181f), x);
  // The least relative error of all polynomials of its degree with p(0) = 1, |r| <= ln(2) / 2.
  Vec p = splat(1.38436072e-3f);
  p = fma(p, r, splat(8.37419555e-3f));
  p = fma(p, r, splat(4.16680053e-2f));
  p = fma(p, r, splat(1.66664302e-1f));
  p = fma(p, r, splat(4.99999940e-1f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return as_float(as_int(p) + (as_int(shifted) << 23));  // the low bits of `shifted` are the power
}

inline Vec exp_from_lowest(Vec x) {
  return exp_from_lowest(x, [](Vec a, Vec b, Vec c) { return fma(a, b, c); });
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

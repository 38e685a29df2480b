// AVX-512's instructions on bf16 on a CPU without them: what csrc/cpu calls by name, rounded and
// summed as a CPU does it, but for what is too small for a float's usual exponents.
#pragma once

#include <immintrin.h>

#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh fastrl_emulated::to_bf16
#define _mm512_cvtne2ps_pbh fastrl_emulated::both_to_bf16
#define _mm512_dpbf16_ps fastrl_emulated::dot

namespace fastrl_emulated {

inline __m256bh to_bf16(__m512 x) {  // to the nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
  return (__m256bh)_mm512_cvtepi32_epi16(high);
}

inline __m512bh both_to_bf16(__m512 high, __m512 low) {
  return (__m512bh)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)to_bf16(low)),
                                      (__m256i)to_bf16(high), 1);
}

inline __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
  const auto even = [](__m512bh x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32((__m512i)x, 16));
  };
  const auto odd = [](__m512bh x) {
    return _mm512_castsi512_ps(_mm512_and_si512((__m512i)x, _mm512_set1_epi32(-65536)));
  };
  return _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum));
}

}  // namespace fastrl_emulated

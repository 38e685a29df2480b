// Exact integer products of weight rows with a few tokens: then reading the weights is what takes
// time, and the lanes of a panel would be empty. Depth runs along the vectors instead, each weight
// row is read once, as wide as vectors are, and its next neighbours are asked for ahead of time.
#pragma once

#include <numeric>

#include "quant_gemm.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// As in quant_gemm.h tokens are unsigned, 128 more than they are, where VNNI multiplies them.
#if defined(__AVX512VNNI__)
constexpr int64_t kFew = 12;  // above, panels take no longer
typedef uint8_t Token;
typedef __m512i AlongDepth;
constexpr int64_t kWide = 64;  // elements of depth in a vector
inline AlongDepth load_token(const Token* x) { return _mm512_loadu_si512(x); }
inline AlongDepth load_row(const int8_t* w) { return _mm512_loadu_si512(w); }
inline AlongDepth dot(AlongDepth sum, AlongDepth token, AlongDepth row) {
  return _mm512_dpbusd_epi32(sum, token, row);
}
#elif defined(__AVX512F__)
constexpr int64_t kFew = 8;
typedef int16_t Token;
typedef __m512i AlongDepth;
constexpr int64_t kWide = 32;
inline AlongDepth load_token(const Token* x) { return _mm512_loadu_si512(x); }
inline AlongDepth load_row(const int8_t* w) {
  // With a mask of all lanes: the plain intrinsic warns of the operand that it leaves undefined.
  return _mm512_maskz_cvtepi8_epi16(0xffffffff,
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
inline AlongDepth dot(AlongDepth sum, AlongDepth token, AlongDepth row) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(token, row));
}
#elif defined(__AVX2__)
constexpr int64_t kFew = 4;
typedef int16_t Token;
typedef __m256i AlongDepth;
constexpr int64_t kWide = 16;
inline AlongDepth load_token(const Token* x) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}
inline AlongDepth load_row(const int8_t* w) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
}
inline AlongDepth dot(AlongDepth sum, AlongDepth token, AlongDepth row) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(token, row));
}
#else
constexpr int64_t kFew = 0;
#endif

#if defined(__AVX2__)
constexpr int kTileTokens = 4;  // of a tile

// The sum of all lanes, modulo 2^32: shifted sums may pass 2^31 on the way.
inline uint32_t total(AlongDepth sum) {
  uint32_t lanes[sizeof(AlongDepth) / 4];
  std::memcpy(lanes, &sum, sizeof lanes);
  return std::accumulate(lanes, lanes + sizeof(AlongDepth) / 4, uint32_t{0});
}

// Tokens [rows, width] to [rows rounded up to kTileTokens][depth]; 0 behind them.
inline void widen_tokens(const int8_t* from, int64_t rows, int64_t width, int64_t depth,
                         Token* to) {
  for (int64_t i = 0; i < round_up(rows, kTileTokens); ++i, to += depth) {
    const int64_t n = i < rows ? width : 0;
    for (int64_t k = 0; k < n; ++k) {
      to[k] =
          static_cast<Token>(sizeof(Token) == 1 ? from[i * width + k] + 128 : from[i * width + k]);
    }
    std::fill(to + n, to + depth, Token{0});
  }
}

// c[r][t] of R weight rows and T tokens, the whole depth; rows of c are kPanel apart.
template <int R, int T>
void few_tile(const int8_t* w, int64_t depth, const Token* x, int32_t* c) {
  AlongDepth sum[R][T], shift[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    shift[r] = AlongDepth{};
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      sum[r][t] = AlongDepth{};
    }
  }
  for (int64_t k = 0; k < depth; k += kWide) {
    AlongDepth token[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      token[t] = load_token(x + t * depth + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int8_t* at = w + r * depth + k;
      __builtin_prefetch(at + R * depth, 0, 2);
      const AlongDepth row = load_row(at);
#if defined(__AVX512VNNI__)
      shift[r] = _mm512_dpbusd_epi32(shift[r], _mm512_set1_epi8(-128), row);  // 128, unsigned
#endif
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        sum[r][t] = dot(sum[r][t], token[t], row);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      c[r * kPanel + t] = static_cast<int32_t>(total(sum[r][t]) - total(shift[r]));
    }
  }
}

// C[rows x tokens], rows of C kPanel apart, of weight rows [rows][depth] and widened tokens.
inline void multiply_few(const int8_t* w, int64_t rows, int64_t depth, const Token* x,
                         int64_t tokens, int32_t* c) {
  const auto run = [&](auto one, auto four, int64_t t) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      four(w + r * depth, depth, x + t * depth, c + r * kPanel + t);
    }
    for (; r < rows; ++r) {
      one(w + r * depth, depth, x + t * depth, c + r * kPanel + t);
    }
  };
  for (int64_t t = 0; t < tokens; t += kTileTokens) {
    if (tokens - t == 1) {
      run(few_tile<1, 1>, few_tile<4, 1>, t);
    } else if (tokens - t == 2) {
      run(few_tile<1, 2>, few_tile<4, 2>, t);
    } else {
      run(few_tile<1, 4>, few_tile<4, 4>, t);
    }
  }
}
#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Exact integer products: rows of int8 weights times packed panels of int8 tokens, in int32.
//
//   C[weight rows x tokens] = W[weight rows x depth] * X[depth x tokens]
//
// As in gemm.h the weights are read where they lie and only the tokens are packed, kPanel to a
// panel, so that an output's scale is a lane's and no weight is ever stored twice. How many
// neighbours in depth share 32 bits of a panel is what the instruction set multiplies at once:
//
//   four int8 with AMX, and with VNNI, whose tokens are unsigned: 128 more than they are, and
//     128 times the sum of the weight row is taken off in the end (all modulo 2^32);
//   two int16 otherwise, as the AVX2 instruction for bytes saturates: a slice of weight rows is
//     widened first.
#pragma once

#include "pack.h"
#include "quant.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

#if defined(FASTRL_TILES) || defined(__AVX512VNNI__)
constexpr int kDepth = 4;
#else
constexpr int kDepth = 2;
#endif
#if defined(__AVX512VNNI__) && !defined(FASTRL_TILES)
constexpr bool kShifted = true;
#else
constexpr bool kShifted = false;
#endif

inline int64_t words(int64_t depth) { return round_up(depth, 64) / kDepth; }

// Tokens [rows, width] to [words(width)][kPanel] words.
inline void pack_tokens(const int8_t* from, int64_t rows, int64_t width, uint32_t* panel) {
  const int64_t count = words(width);
  alignas(64) int8_t line[kPanel][64];
  for (int64_t k = 0; k < width; k += 64) {  // a cache line of every token at a time
    const int64_t n = std::min<int64_t>(64, width - k);
    std::memset(line, 0, sizeof line);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(line[i], from + i * width + k, n);
    }
    if constexpr (kDepth == 4) {
      uint32_t* to = panel + k / 4 * kPanel;
      transpose_words(line, 16, kPanel, 16, to, kPanel);
      for (int i = 0; kShifted && i < 16 * kPanel; ++i) {
        to[i] ^= 0x80808080u;
      }
      continue;
    }
    for (int64_t w = k / kDepth; w < std::min(count, (k + 64) / kDepth); ++w) {
      uint32_t* to = panel + w * kPanel;
      for (int i = 0; i < kPanel; ++i) {
        const int8_t* at = line[i] + w * kDepth - k;
        to[i] = static_cast<uint16_t>(int16_t{at[0]}) |
                static_cast<uint32_t>(static_cast<uint16_t>(int16_t{at[1]})) << 16;
      }
    }
  }
}

#ifdef FASTRL_TILES

// gemm.h's products, of rows that are whole tiles deep.
struct Fours {
  using Element = uint32_t;
  using Sum = int32_t;
  static constexpr int kStep = kDepth;
  static constexpr int64_t kSteps = 256;
  template <int C, int A, int B>
  static inline void multiply_tiles() {
    tile_multiply_int8<C, A, B>();
  }
};

constexpr int64_t kWeightRows = kBlock;
constexpr int64_t kTogether = 1;

#else

// sum += the products of a word of a weight row with those of kLanes tokens.
inline IVec multiply_add(IVec sum, int32_t weight, IVec tokens) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)tokens, _mm512_set1_epi32(weight));
#elif defined(__AVX512F__)
  return sum + (IVec)(__v16si)_mm512_madd_epi16((__m512i)tokens, _mm512_set1_epi32(weight));
#elif defined(__AVX2__)
  return sum + (IVec)_mm256_madd_epi16((__m256i)tokens, _mm256_set1_epi32(weight));
#elif defined(__SSE2__)
  return sum + (IVec)_mm_madd_epi16((__m128i)tokens, _mm_set1_epi32(weight));
#else
  return sum + (tokens << 16 >> 16) * (weight << 16 >> 16) + (tokens >> 16) * (weight >> 16);
#endif
}

constexpr int64_t kWeightRows = 192;  // taken together: a multiple of kMostRows and of kLanes
constexpr int64_t kTogether = 4;      // panels whose sums are held at a time
// Words of depth taken at a time: a slice of a panel stays in L1 while the weight rows pass.
constexpr int64_t kWords = kPanel > 32 ? 128 : 256;

// Weight rows as they are multiplied: row r at data + r * stride bytes, `rows` of them.
struct WeightRows {
  const char* data;
  int64_t stride, rows;
  const int32_t* start;  // what each row's sums start from; null: they are added to
  // The last row stands for those behind it: computed, never used.
  const char* row(int64_t r) const { return data + std::min(r, rows - 1) * stride; }
};

// R x V vectors of C from `count` words of depth. See gemm.h.
template <int R, int V>
__attribute__((noinline)) void multiply_words(const WeightRows& w, int64_t r0, int64_t count,
                                              const uint32_t* panel, int32_t* c) {
  const char* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    rows[r] = w.row(r0 + r);
  }
  IVec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sum[r][j] = IVec{};
    }
  }
  for (int64_t k = 0; k < count; ++k, panel += kPanel) {
    IVec x[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      std::memcpy(&x[j], panel + j * kLanes, sizeof x[j]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int32_t word;
      std::memcpy(&word, rows[r] + k * 4, sizeof word);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        sum[r][j] = multiply_add(sum[r][j], word, x[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      int32_t* to = c + (r0 + r) * kPanel + j * kLanes;
      IVec before;
      if (w.start) {
        before = IVec{} + w.start[r0 + r];
      } else {
        std::memcpy(&before, to, sizeof before);
      }
      sum[r][j] += before;
      std::memcpy(to, &sum[r][j], sizeof sum[r][j]);
    }
  }
}

// C = or += weight rows times `vectors` vectors of a panel, `count` words deep.
inline void multiply_slice(const WeightRows& w, int64_t count, const uint32_t* panel, int vectors,
                           int32_t* c) {
  const auto run = [&](auto multiply, int rows) {
    for (int64_t r = 0; r < w.rows; r += rows) {
      multiply(w, r, count, panel, c);
    }
  };
  if (vectors == 1) {
    run(multiply_words<kMostRows, 1>, kMostRows);
  } else if (vectors == 2) {
    run(multiply_words<kSums / 2, 2>, kSums / 2);
  } else {
    run(multiply_words<kRows, kVectors>, kRows);
  }
}

#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

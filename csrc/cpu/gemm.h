// Products of a small block of rows with packed panels: the matrix arithmetic of the CPU kernels,
// in the namespace of the instruction set being compiled.
//
//   C[rows x tokens] += A[rows x depth] * B[depth x tokens]
//
// A is read where it lies, one scalar (or one pair of bf16) broadcast at a time, so weights need no
// copy. B is packed into panels of kPanel columns, a column per lane, so that what follows a
// product (a maximum over the rows, say) runs down the rows without crossing lanes. The depth is
// summed in blocks of Kind::kSteps, each from zero and in order: an element of C has the same bits
// whatever block, panel or batch it is computed in.
//
// Two kinds: floats; or bf16 pairs, two neighbours in depth side by side in 32 bits, whose products
// the CPU sums in float (AVX-512 BF16; AMX, where a pair of neighbouring rows of a panel is a row
// of a tile). Where A has floats and the panel pairs, Kind::OfFloats.
#pragma once

#include <algorithm>

#include "simd.h"
#include "tiles.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Vectors per panel, chosen with kRows so that a tile of C stays in registers.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kRows = 6;
#ifdef FASTRL_TILES
constexpr int kBlock = 96;  // rows of A taken together; a multiple of 2 kRows and of a tile's rows
#else
constexpr int kBlock = 48;
#endif

// One element of A or B as it is stored: a float, or a pair of bf16 as 32 bits. And how numbers
// that a product will read are kept meanwhile: as exactly as that product needs them.
struct Floats {
  using Element = float;
  static constexpr int kStep = 1;         // elements of depth in one
  static constexpr int kBytes = 4;        // of a row of A that meet it
  static constexpr int64_t kSteps = 256;  // that are summed from zero
  using OfFloats = Floats;
  static inline Vec multiply_add(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }

  using Kept = float;
  static inline void keep(Vec x, float* to) { store(to, x); }
  static inline Vec kept(const float* from) { return load(from); }
  static inline Vec rounded(Vec x) { return x; }
};

#if defined(__AVX512BF16__) || defined(FASTRL_TILES)
#define FASTRL_PAIRS
// A's numbers as they are, and the panel's as if they had been floats: the sums of Floats.
struct UnpairedFloats {
  using Element = uint32_t;
  static constexpr int kStep = 2, kBytes = 8;
  static constexpr int64_t kSteps = Floats::kSteps / kStep;
  static inline Vec multiply_add(const uint32_t* a, Vec b, Vec c) {
    float even_odd[2];
    std::memcpy(even_odd, a, sizeof even_odd);
    const Vec even = as_float(as_int(b) << 16), odd = as_float(as_int(b) & -65536);
    return fma(splat(even_odd[1]), odd, fma(splat(even_odd[0]), even, c));
  }
};

struct Pairs {
  using Element = uint32_t;
  using OfFloats = UnpairedFloats;
  static constexpr int kStep = 2, kBytes = 4;
#ifdef FASTRL_TILES
  static constexpr int64_t kSteps = 256;
#else
  static constexpr int64_t kSteps = 128;
#endif
  static inline Vec multiply_add(const uint32_t* a, Vec b, Vec c) {
    int32_t bits;  // a row may start at any even address
    std::memcpy(&bits, a, sizeof bits);
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
  }

  using Kept = uint16_t;  // bf16
  static inline __m256i to_bf16(Vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
  static inline Vec widen(__m256i halves) {
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  }
  static inline void keep(Vec x, uint16_t* to) {
    const __m256i halves = to_bf16(x);
    std::memcpy(to, &halves, sizeof halves);
  }
  static inline Vec kept(const uint16_t* from) {
    __m256i halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(halves);
  }
  static inline Vec rounded(Vec x) { return widen(to_bf16(x)); }
  static inline Vec pairs(const uint16_t* even, const uint16_t* odd) {
    const auto bits = [](Vec x) { return _mm512_castps_si512((__m512)x); };
    return (Vec)_mm512_or_si512(bits(kept(odd)), _mm512_srli_epi32(bits(kept(even)), 16));
  }
};
#endif

// Where the rows of A are: element k of row r at data + row[r] + k * stride, counted in bytes, as
// rows of bf16 may lie at odd multiples of half an Element.
struct Rows {
  const char* data;
  int64_t row[kBlock];
  int64_t stride;
};

// Bytes of the next slice of a panel that a step of depth asks for: all of them in a block of rows.
constexpr int64_t kPace = kPanel * 4 * kRows / 48;

// R x V vectors of C from `steps` Elements of depth, stored if first, else added; kPace bytes a
// step are asked for from `ahead` on. A function of its own: inlined, it shares the registers with
// what surrounds it and spills its sums.
template <class Kind, int R, int V>
__attribute__((noinline)) void multiply_tile(const Rows& a, int r0, int64_t k0, int64_t steps,
                                             const typename Kind::Element* panel, float* c,
                                             bool first, const char* ahead) {
  using Element = typename Kind::Element;
  const char* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = a.data + a.row[r0 + r] + k0 * a.stride;
  }
  Vec sum[R][V];  // in registers, as long as every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sum[r][j] = splat(0.0f);
    }
  }
  const float* b = reinterpret_cast<const float*>(panel) + k0 * kPanel;
  // One offset for all rows: an addition for each would take its turn from a multiplication.
  const int64_t stride = a.stride, end = steps * stride;
  for (int64_t at = 0; at != end; at += stride, b += kPanel, ahead += kPace) {
    __builtin_prefetch(ahead, 0, 2);
    Vec x[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      x[j] = load(b + j * kLanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const auto* element = reinterpret_cast<const Element*>(rows[r] + at);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        sum[r][j] = Kind::multiply_add(element, x[j], sum[r][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = c + (r0 + r) * kPanel + j * kLanes;
      store(to, first ? sum[r][j] : load(to) + sum[r][j]);
    }
  }
}

// C[kBlock x kPanel] = A * panel for `rows` rows (a multiple of 2 kRows is computed), the first
// `vectors` of the panel's vectors, and `steps` Elements of depth.
template <class Kind>
void multiply(const Rows& a, int rows, int64_t steps, const typename Kind::Element* panel,
              int vectors, float* c) {
  constexpr int64_t kSteps = Kind::kSteps;
  if (vectors == 1) {  // few columns: each row of A streams through once
    for (int r = 0; r < rows; r += 2 * kRows) {
      for (int64_t k = 0; k < steps; k += kSteps) {
        multiply_tile<Kind, 2 * kRows, 1>(a, r, k, std::min(kSteps, steps - k), panel, c, k == 0,
                                          reinterpret_cast<const char*>(panel));
      }
    }
    return;
  }
  for (int64_t k = 0; k < steps; k += kSteps) {  // many: a slice of the panel stays in L1
    const int64_t count = std::min(kSteps, steps - k);
    const char* ahead = reinterpret_cast<const char*>(panel + (k + count) * kPanel);
    for (int r = 0; r < rows; r += kRows, ahead += count * kPace) {
      if (vectors == 2) {
        multiply_tile<Kind, kRows, 2>(a, r, k, count, panel, c, k == 0, ahead);
      } else {
        multiply_tile<Kind, kRows, kVectors>(a, r, k, count, panel, c, k == 0, ahead);
      }
    }
  }
}

#ifdef FASTRL_TILES

static_assert(kLanes == 16 && kBlock % 32 == 0);

// 16 rows of A from r0, 16 Elements of each, into tile T; where they do not lie as a tile is read,
// or there are fewer Elements, through a copy.
template <int T>
inline void load_rows(const Rows& a, int r0, int64_t k0, int64_t steps) {
  const int64_t stride = a.row[r0 + 1] - a.row[r0];
  const char* from = a.data + a.row[r0] + k0 * a.stride;
  if (steps == 16 && a.stride == 4 && a.row[r0 + 15] - a.row[r0] == 15 * stride) {
    return tile_load<T>(from, stride);
  }
  alignas(64) uint32_t copy[16][16] = {};
  for (int r = 0; r < 16; ++r) {
    for (int64_t k = 0; k < steps; ++k) {
      std::memcpy(&copy[r][k], a.data + a.row[r0 + r] + (k0 + k) * a.stride, 4);
    }
  }
  tile_load<T>(copy, 64);
}

// 16 columns of B, likewise.
template <int T>
inline void load_columns(const uint32_t* from, int64_t steps) {
  if (steps == 16) {
    return tile_load<T>(from, kPanel * 4);
  }
  alignas(64) uint32_t copy[16][16] = {};
  for (int64_t k = 0; k < steps; ++k) {
    std::memcpy(copy[k], from + k * kPanel, 64);
  }
  tile_load<T>(copy, 64);
}

template <int T>
inline void store_sums(float* to, bool first) {
  if (first) {
    return tile_store<T>(to, kPanel * 4);
  }
  alignas(64) float sum[16][16];
  tile_store<T>(sum, 64);
  for (int r = 0; r < 16; ++r) {
    store(to + r * kPanel, load(to + r * kPanel) + load(sum[r]));
  }
}

// R x V tiles of C: two by two loads half as many tiles as it multiplies.
template <int R, int V>
void multiply_tiles(const Rows& a, int r0, int64_t k0, int64_t steps, const uint32_t* panel,
                    float* c, bool first) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  const uint32_t* b = panel + k0 * kPanel;
  for (int64_t k = 0; k < steps; k += 16, b += 16 * kPanel) {
    const int64_t count = std::min<int64_t>(16, steps - k);
    load_columns<6>(b, count);
    load_rows<4>(a, r0, k0 + k, count);
    tile_multiply_bf16<0, 4, 6>();
    if constexpr (V == 2) {
      load_columns<7>(b + 16, count);
      tile_multiply_bf16<1, 4, 7>();
    }
    if constexpr (R == 2) {
      load_rows<5>(a, r0 + 16, k0 + k, count);
      tile_multiply_bf16<2, 5, 6>();
      if constexpr (V == 2) {
        tile_multiply_bf16<3, 5, 7>();
      }
    }
  }
  float* to = c + r0 * kPanel;
  store_sums<0>(to, first);
  if constexpr (V == 2) {
    store_sums<1>(to + 16, first);
  }
  if constexpr (R == 2) {
    store_sums<2>(to + 16 * kPanel, first);
    if constexpr (V == 2) {
      store_sums<3>(to + 16 * kPanel + 16, first);
    }
  }
}

// As above: a slice of 32 columns of the panel stays in L1 while A streams by.
template <>
void multiply<Pairs>(const Rows& a, int rows, int64_t steps, const uint32_t* panel, int vectors,
                     float* c) {
  const Tiles tiles;
  for (int64_t k = 0; k < steps; k += Pairs::kSteps) {
    const int64_t count = std::min(Pairs::kSteps, steps - k);
    for (int j = 0; j < vectors; j += 2) {
      for (int r = 0; r < rows; r += 32) {
        const bool two = r + 16 < rows;
        const auto run = vectors == 1 ? (two ? multiply_tiles<2, 1> : multiply_tiles<1, 1>)
                                      : (two ? multiply_tiles<2, 2> : multiply_tiles<1, 2>);
        run(a, r, k, count, panel + j * 16, c + j * 16, k == 0);
      }
    }
  }
}

#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Products of a small block of rows with packed panels: the matrix arithmetic of the CPU kernels,
// in the namespace of the instruction set being compiled.
//
//   C[rows x tokens] += A[rows x depth] * B[depth x tokens]
//
// A is read where it lies, one scalar (or one pair of bf16) broadcast at a time, so weights need no
// copy. B is packed into panels of kPanel columns, a column per lane, so that what follows a
// product (a maximum over the rows, say) runs down the rows without crossing lanes. The depth is
// summed in blocks of Kind::kSteps in order, each from zero, or with AMX on from the last: an
// element of C has the same bits whatever block, panel or batch it is computed in.
//
// Two kinds: floats; or bf16 pairs, two neighbours in depth side by side in 32 bits, whose products
// the CPU sums in float (AVX-512 BF16; AMX, where a pair of neighbouring rows of a panel is a row
// of a tile). Where A has floats and the panel pairs, Kind::OfFloats. AMX's tiles multiply a third,
// fours of int8 (quant_gemm.h), the same way.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"
#include "tiles.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Vectors per panel, chosen with kRows so that a tile of C stays in registers. A panel that is two
// of AMX's tiles wide is read from end to end, and a slice of it finds room in every set of L1.
#ifdef FASTRL_TILES
constexpr int kVectors = 2;
constexpr int kBlock = 96;  // rows of A taken together, a multiple of kMostRows and of 32
#else
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int kBlock = 48;
#endif
constexpr int kPanel = kVectors * kLanes;
constexpr int kSums = kLanes == 16 ? 24 : 12;  // vectors of C in registers
constexpr int kRows = kSums / kVectors;
constexpr int kMostRows = 12;  // of a narrower tile

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
  using Sum = float;
  template <int C, int A, int B>
  static inline void multiply_tiles() {
    tile_multiply_bf16<C, A, B>();
  }
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
  int64_t sixteen = 64;  // with AMX: bytes from 16 contiguous Elements of a row to the next 16
};

// An A that is made here, of `steps` Elements a row: row by row, or for AMX as [row / 16]
// [step / 16][row % 16][16], so that what it reads together lies together. Rows by sixteens then.
template <class Kind>
struct Made {
#ifdef FASTRL_TILES
  static constexpr bool kTiles = Kind::kStep > 1;
#else
  static constexpr bool kTiles = false;
#endif
  int64_t steps;

  // Elements from the start, for a step that is a multiple of 16.
  int64_t at(int64_t row, int64_t step) const {
    return kTiles ? row / 16 * 16 * steps + step * 16 + row % 16 * 16 : row * steps + step;
  }
  // `n` rows from `first` on; those behind them are computed, never used.
  Rows rows(const typename Kind::Element* data, int64_t first, int n) const {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(data);
    rows.stride = sizeof(typename Kind::Element);
    rows.sixteen = (kTiles ? 256 : 16) * rows.stride;
    for (int r = 0; r < kBlock; ++r) {
      rows.row[r] = at(first + (kTiles ? r : std::min(r, n - 1)), 0) * rows.stride;
    }
    return rows;
  }
};

// Steps of depth of R x V tiles, in a product that has something to do beside it.
inline int64_t tile_steps(int64_t rows, int64_t steps) {
  return (rows + 31) / 32 * ((steps + 15) / 16);
}

// What there is to do beside a product, a step at a time: nothing. A run of steps is taken by a
// copy, which the loop around it can keep in registers.
struct Nothing {
  Nothing begin(int64_t) { return {}; }
  void end(Nothing) {}
  void step() {}
};

// Asking for memory, to be in L2, that is wanted next: a part of `bytes` in each of `steps`.
class Fetching {
 public:
  Fetching(const char* from, int64_t bytes, int64_t steps)
      : at_(from), end_(from + bytes), each_((bytes / 64 + steps - 1) / steps * 64) {}

  void step() {
    for (const char* const end = std::min(at_ + each_, end_); at_ < end; at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
    }
  }

  Fetching begin(int64_t) { return *this; }
  void end(const Fetching& run) { *this = run; }

 private:
  const char *at_, *end_;
  int64_t each_;
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

// C[kBlock x kPanel] = A * panel, or `onto` what C has, for `rows` rows (a multiple of kMostRows is
// computed), the first `vectors` of the panel's vectors, and `steps` Elements of depth.
template <class Kind>
void multiply(const Rows& a, int rows, int64_t steps, const typename Kind::Element* panel,
              int vectors, float* c, bool onto = false) {
  constexpr int64_t kSteps = Kind::kSteps;
  if (vectors == 1) {  // few columns: each row of A streams through once
    for (int r = 0; r < rows; r += kMostRows) {
      for (int64_t k = 0; k < steps; k += kSteps) {
        multiply_tile<Kind, kMostRows, 1>(a, r, k, std::min(kSteps, steps - k), panel, c,
                                          k == 0 && !onto, reinterpret_cast<const char*>(panel));
      }
    }
    return;
  }
  for (int64_t k = 0; k < steps; k += kSteps) {  // many: a slice of the panel stays in L1
    const int64_t count = std::min(kSteps, steps - k);
    const char* ahead = reinterpret_cast<const char*>(panel + (k + count) * kPanel);
    const bool first = k == 0 && !onto;
    for (int r = 0; r < rows; r += kRows, ahead += count * kPace) {
      if (vectors == 2) {
        multiply_tile<Kind, kRows, 2>(a, r, k, count, panel, c, first, ahead);
      } else {
        multiply_tile<Kind, kRows, kVectors>(a, r, k, count, panel, c, first, ahead);
      }
    }
  }
}

#ifdef FASTRL_TILES

static_assert(kLanes == 16 && kBlock % 32 == 0);

template <int T>
using Tile = std::integral_constant<int, T>;

// Whether the 16 rows of A from r0 lie as a tile is read.
inline bool is_tile(const Rows& a, int r0) {
  return a.stride == 4 && a.row[r0 + 15] - a.row[r0] == 15 * (a.row[r0 + 1] - a.row[r0]);
}

// `steps` Elements of 16 rows of A into tile T, wherever they lie, and of 16 columns of B.
template <int T>
__attribute__((noinline)) void gather_rows(const Rows& a, int r0, int64_t k0, int64_t steps) {
  alignas(64) uint32_t copy[16][16] = {};
  for (int r = 0; r < 16; ++r) {
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t at =
          a.stride == 4 ? (k0 + k) / 16 * a.sixteen + (k0 + k) % 16 * 4 : (k0 + k) * a.stride;
      std::memcpy(&copy[r][k], a.data + a.row[r0 + r] + at, 4);
    }
  }
  tile_load<T>(copy, 64);
}

template <int T>
__attribute__((noinline)) void gather_columns(const uint32_t* from, int64_t steps) {
  alignas(64) uint32_t copy[16][16] = {};
  for (int64_t k = 0; k < steps; ++k) {
    std::memcpy(copy[k], from + k * kPanel, 64);
  }
  tile_load<T>(copy, 64);
}

// R x V tiles of sums: from 0 or from `c`.
template <int R, int V, class Sum>
inline void start_sums(const Sum* c, bool first) {
  constexpr int64_t kStride = kPanel * 4;
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    return;
  }
  tile_load<0>(c, kStride);
  if constexpr (V == 2) {
    tile_load<1>(c + 16, kStride);
  }
  if constexpr (R == 2) {
    tile_load<2>(c + 16 * kPanel, kStride);
    if constexpr (V == 2) {
      tile_load<3>(c + 16 * kPanel + 16, kStride);
    }
  }
}

template <int R, int V, class Sum>
inline void store_sums(Sum* c) {
  constexpr int64_t kStride = kPanel * 4;
  tile_store<0>(c, kStride);
  if constexpr (V == 2) {
    tile_store<1>(c + 16, kStride);
  }
  if constexpr (R == 2) {
    tile_store<2>(c + 16 * kPanel, kStride);
    if constexpr (V == 2) {
      tile_store<3>(c + 16 * kPanel + 16, kStride);
    }
  }
}

// A step of depth of R x V tiles. load_rows(T, i) has the i-th 16 rows of A, load_columns(T, j)
// the columns of B: two by two, half as many as are multiplied.
template <class Kind, int R, int V, class LoadRows, class LoadColumns>
inline void multiply_step(LoadRows load_rows, LoadColumns load_columns) {
  load_columns(Tile<6>(), 0);
  load_rows(Tile<4>(), 0);
  Kind::template multiply_tiles<0, 4, 6>();
  if constexpr (V == 2) {
    load_columns(Tile<7>(), 1);
    Kind::template multiply_tiles<1, 4, 7>();
  }
  if constexpr (R == 2) {
    load_rows(Tile<5>(), 1);
    Kind::template multiply_tiles<2, 5, 6>();
    if constexpr (V == 2) {
      Kind::template multiply_tiles<3, 5, 7>();
    }
  }
}

template <int T, bool kStays>
inline void load_tile(const void* from, int64_t stride) {
  kStays ? tile_load<T>(from, stride) : tile_load_once<T>(from, stride);
}

// R x V tiles of C from `steps` Elements of depth. Either the panel or the rows are to stay in L1.
template <class Kind, int R, int V, class Aside, bool kRowsStay = false>
void multiply_tiles(const Rows& a, int r0, int64_t k0, int64_t steps, const uint32_t* panel,
                    typename Kind::Sum* c, bool first, Fetching& ahead, Aside& aside) {
  start_sums<R, V>(c, first);
  const uint32_t* b = panel + k0 * kPanel;
  const bool even = is_tile(a, r0) && (R == 1 || is_tile(a, r0 + 16));
  const int64_t whole = even ? steps / 16 : 0;
  const char* rows[R];
  int64_t stride[R];
  for (int i = 0; i < R; ++i) {
    const int64_t* row = a.row + r0 + 16 * i;
    rows[i] = a.data + row[0] + k0 / 16 * a.sixteen;
    stride[i] = row[1] - row[0];
  }
  const int64_t sixteen = a.sixteen;
  int64_t at = 0;
  Fetching fetching = ahead;  // in registers
  auto beside = aside.begin(whole);
  for (int64_t k = 0; k < whole; ++k, b += 16 * kPanel, at += sixteen) {
    fetching.step();
    beside.step();
    multiply_step<Kind, R, V>(
        [&](auto t, int i) { load_tile<t.value, kRowsStay>(rows[i] + at, stride[i]); },
        [&](auto t, int j) { load_tile<t.value, !kRowsStay>(b + 16 * j, kPanel * 4); });
  }
  ahead = fetching;
  aside.end(beside);
  for (int64_t k = 16 * whole; k < steps; k += 16, b += 16 * kPanel) {
    const int64_t count = std::min<int64_t>(16, steps - k);
    multiply_step<Kind, R, V>(
        [&](auto t, int i) { gather_rows<t.value>(a, r0 + 16 * i, k0 + k, count); },
        [&](auto t, int j) { gather_columns<t.value>(b + 16 * j, count); });
  }
  store_sums<R, V>(c);
}

// C[rows x kPanel] of blocks of A one behind the other, all but the last of kBlock rows, or `onto`
// what C has. A slice of the panel stays in L1 while A streams by, and the next one is asked for.
// Sums go on from slice to slice. aside.step() is called at every step of depth: what vectors do
// there takes half the time that it takes alone.
template <class Kind, class Aside>
void multiply_beside(Kind, const Rows* blocks, int64_t rows, int64_t steps, const uint32_t* panel,
                     int vectors, typename Kind::Sum* c, Aside& aside, bool onto = false) {
  const Tiles tiles;
  const int64_t slices = rows > 32 ? (steps + Kind::kSteps - 1) / Kind::kSteps : 1;
  const int64_t each = ((steps + slices - 1) / slices + 15) / 16 * 16;
  for (int64_t k = 0; k < steps; k += each) {
    const int64_t count = std::min(each, steps - k);
    Fetching ahead(reinterpret_cast<const char*>(panel + (k + count) * kPanel),
                   rows > 32 ? count * kPanel * 4 : 0, tile_steps(rows, count));
    for (int64_t r = 0; r < rows; r += 32) {
      const bool two = r + 16 < rows;
      const auto run =
          vectors == 1
              ? (two ? multiply_tiles<Kind, 2, 1, Aside> : multiply_tiles<Kind, 1, 1, Aside>)
              : (two ? multiply_tiles<Kind, 2, 2, Aside> : multiply_tiles<Kind, 1, 2, Aside>);
      run(blocks[r / kBlock], r % kBlock, k, count, panel, c + r * kPanel, k == 0 && !onto, ahead,
          aside);
    }
  }
}

template <>
inline void multiply<Pairs>(const Rows& a, int rows, int64_t steps, const uint32_t* panel,
                            int vectors, float* c, bool onto) {
  Nothing nothing;
  multiply_beside(Pairs(), &a, rows, steps, panel, vectors, c, nothing, onto);
}

#endif

// C[rows x kPanel] of blocks of A one behind the other, all but the last of kBlock rows, or `onto`
// what C has. With tiles, `aside` is beside.
template <class Kind, class Aside = Nothing>
void multiply_blocks(const Rows* blocks, int64_t rows, int64_t steps,
                     const typename Kind::Element* panel, int vectors, float* c, bool onto = false,
                     Aside&& aside = {}) {
  if constexpr (Made<Kind>::kTiles) {
    return multiply_beside(Kind(), blocks, rows, steps, panel, vectors, c, aside, onto);
  }
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows - r));
    multiply<Kind>(blocks[r / kBlock], n, steps, panel, vectors, c + r * kPanel, onto);
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

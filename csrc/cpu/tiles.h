// The matrix tiles of AMX, in the namespace of the instruction set being compiled: eight tiles of
// 16 rows of 64 bytes.
//
//   C[16 x 16 floats] += A[16 x 32 bf16] * B[16 x 16 pairs of bf16]
//   C[16 x 16 int32] += A[16 x 64 int8] * B[16 x 16 fours of int8]
//
// A is row-major as stored; a row of B holds 16 columns, each a pair (or four) of neighbours in
// depth.
#pragma once

#if defined(FASTRL_EMULATE_AMX)
#include "emulated_tiles.h"  // the tests', for machines without AMX
#define FASTRL_TILES
#elif defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstdint>
#define FASTRL_TILES

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// In assembly, as GCC's intrinsics take only literal numbers of tiles.
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

// Not to be kept in L1: what is read again stays there.
template <int T>
inline void tile_load_once(const void* from, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int C, int A, int B>
inline void tile_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
inline void tile_multiply_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Not GCC's intrinsic, which says that it reads 8 bytes.
template <class Shapes>
inline void tile_configure(const Shapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void tile_release() { _tile_release(); }

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl
#endif

#ifdef FASTRL_TILES
namespace fastrl {
namespace FASTRL_ISA {
namespace {

// As the CPU reads it: of each tile the bytes of a row, and the rows.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Every tile of the thread is 16 x 64 bytes while this lives.
class Tiles {
 public:
  Tiles() { tile_configure(TileShapes()); }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl
#endif

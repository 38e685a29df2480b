// AMX's tiles on a CPU without them: what csrc/cpu/tiles.h wraps, one element at a time. A use that
// a CPU would fault on aborts.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace fastrl {
namespace FASTRL_ISA {
namespace {

struct EmulatedTiles {
  bool configured = false;
  alignas(64) uint8_t row[8][16][64] = {};
};

inline EmulatedTiles& tiles() {
  static thread_local EmulatedTiles all;
  return all;
}

template <int T>
inline uint8_t (&tile())[16][64] {
  static_assert(0 <= T && T < 8);
  if (!tiles().configured) {
    std::abort();
  }
  return tiles().row[T];
}

template <int T>
inline void tile_zero() {
  std::memset(tile<T>(), 0, 1024);
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(tile<T>()[r], static_cast<const char*>(from) + r * stride, 64);
  }
}

template <int T>
inline void tile_load_once(const void* from, int64_t stride) {
  tile_load<T>(from, stride);
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile<T>()[r], 64);
  }
}

// As TDPBF16PS: subnormal inputs and results are 0.
inline float flushed(float x) { return x < 1.17549435e-38f && x > -1.17549435e-38f ? 0.0f : x; }

inline float wide(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

template <int C, int A, int B>
inline void tile_multiply_bf16() {
  static_assert(C != A && C != B && A != B);
  auto &c = tile<C>(), &a = tile<A>(), &b = tile<B>();
  for (int m = 0; m < 16; ++m) {
    float sum[16];
    std::memcpy(sum, c[m], 64);
    for (int k = 0; k < 16; ++k) {
      uint32_t x, y[16];
      std::memcpy(&x, a[m] + 4 * k, 4);
      std::memcpy(y, b[k], 64);
      const float even = wide(x << 16), odd = wide(x & 0xffff0000u);
      for (int n = 0; n < 16; ++n) {
        sum[n] = flushed(sum[n] + even * wide(y[n] << 16));
        sum[n] = flushed(sum[n] + odd * wide(y[n] & 0xffff0000u));
      }
    }
    std::memcpy(c[m], sum, 64);
  }
}

template <int C, int A, int B>
inline void tile_multiply_int8() {
  static_assert(C != A && C != B && A != B);
  auto &c = tile<C>(), &a = tile<A>(), &b = tile<B>();
  for (int m = 0; m < 16; ++m) {
    uint32_t sum[16];  // wraps around, as the instruction's sums do
    std::memcpy(sum, c[m], 64);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) {
          const auto x = static_cast<int8_t>(a[m][4 * k + i]);
          sum[n] += static_cast<uint32_t>(x * static_cast<int8_t>(b[k][4 * n + i]));
        }
      }
    }
    std::memcpy(c[m], sum, 64);
  }
}

template <class Shapes>
inline void tile_configure(const Shapes& shapes) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&shapes);
  for (int t = 0; t < 8; ++t) {
    if (bytes[0] != 1 || bytes[16 + 2 * t] != 64 || bytes[48 + t] != 16) {
      std::abort();
    }
  }
  tiles() = EmulatedTiles();
  tiles().configured = true;
}

inline void tile_release() { tiles().configured = false; }

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

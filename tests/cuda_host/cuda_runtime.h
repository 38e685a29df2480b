// For tests: stands in for CUDA's header, so that g++ builds csrc/cuda/*.cu and runs them on the
// host. Holds what our kernels use; add to it what a new one needs. See block.h for how a block
// runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ \
  static  // one block at a time: its threads share it, AddressSanitizer guards its end
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (cuda_host::Block::current()->fiber().thread)
#define blockIdx (cuda_host::Block::current()->index)
#define blockDim (cuda_host::Block::current()->size)
#define gridDim (cuda_host::Block::current()->grid)
constexpr int warpSize = 32;

// ---- runtime -----------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
typedef void* cudaStream_t;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "error";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 2, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

namespace fastrl {
namespace cuda {

// Takes the place of the launch in csrc/cuda/launch.h, with the limits of real hardware.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   Args&&... args) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || shared > 227 * 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const std::function<void()> body = [&] { kernel(args...); };
  cuda_host::Block state(grid, block, shared);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        state.run(dim3(x, y, z), body);
      }
    }
  }
  return cudaSuccess;
}

// The launch's dynamic shared memory.
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_host::Block::current()->shared.get());
}

}  // namespace cuda
}  // namespace fastrl

// ---- barriers, shuffles, votes -----------------------------------------------------------------

inline void __syncthreads() { cuda_host::Block::current()->sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_host::Block::current()->sync_warp(mask, "__syncwarp");
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_host {

// Every lane of the mask gives x; then `take` reads what they gave.
template <class T, class Take>
auto exchange(unsigned mask, T x, const char* where, Take take) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable<T>::value,
                "what a shuffle can carry");
  Block& block = *Block::current();
  Warp& warp = block.warp();
  std::memcpy(warp.slots[block.fiber().lane()], &x, sizeof x);
  block.sync_warp(mask, where);
  auto result = take([&](int lane) {
    T y;
    std::memcpy(&y, warp.slots[lane], sizeof y);
    return y;
  });
  block.sync_warp(mask, where);  // the slots are free again
  return result;
}

inline int lane() { return Block::current()->fiber().lane(); }

// Reads from `source`, or keeps the own value where that is outside the lane's group of `width`.
template <class T>
T shuffle(unsigned mask, T x, int source, bool inside, const char* where) {
  return exchange(mask, x, where, [&](auto from) { return inside ? from(source) : x; });
}

template <class T, class Fold>
T reduce(unsigned mask, T x, const char* where, Fold fold) {
  return exchange(mask, x, where, [&](auto from) {
    bool first = true;
    T total = x;
    for (int i = 0; i < 32; ++i) {
      if (mask >> i & 1) {
        total = first ? from(i) : fold(total, from(i));
        first = false;
      }
    }
    return total;
  });
}

}  // namespace cuda_host

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const int group = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, x, group + (source & (width - 1)), true, "__shfl_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = 32) {
  const int lane = cuda_host::lane(), source = lane + static_cast<int>(distance);
  return cuda_host::shuffle(mask, x, source, source / width == lane / width, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = 32) {
  const int lane = cuda_host::lane(), source = lane - static_cast<int>(distance);
  return cuda_host::shuffle(mask, x, source, source >= lane / width * width, "__shfl_up_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  const int lane = cuda_host::lane(), source = lane ^ bits;
  return cuda_host::shuffle(mask, x, source, source / width <= lane / width, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return cuda_host::exchange(mask, vote, "__ballot_sync", [&](auto from) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) {
      votes |= (mask >> i & 1) && from(i) ? 1u << i : 0u;
    }
    return votes;
  });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return cuda_host::reduce(mask, x, "__reduce_add_sync", [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return cuda_host::reduce(mask, x, "__reduce_max_sync", [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return cuda_host::reduce(mask, x, "__reduce_min_sync", [](T a, T b) { return b < a ? b : a; });
}

// ---- atomics: fibers switch only at barriers ----------------------------------------------------

template <class T>
T atomicExch(T* at, T x) {
  const T old = *at;
  *at = x;
  return old;
}
template <class T>
T atomicAdd(T* at, T x) {
  return atomicExch(at, static_cast<T>(*at + x));
}
template <class T>
T atomicMax(T* at, T x) {
  return atomicExch(at, *at < x ? x : *at);
}
template <class T>
T atomicMin(T* at, T x) {
  return atomicExch(at, x < *at ? x : *at);
}
template <class T>
T atomicCAS(T* at, T expected, T x) {
  return atomicExch(at, *at == expected ? x : *at);
}

// ---- vectors and intrinsics
// ----------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace cuda_host {
template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace cuda_host

inline int __float_as_int(float x) { return cuda_host::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_host::bits<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_host::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host::bits<float>(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

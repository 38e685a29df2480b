// What every .cu needs around its kernels. Only this file knows the <<<>>> syntax, so that the
// tests can build the same .cu for the host with a cuda_runtime.h of their own.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace fastrl {
namespace cuda {

#ifdef __CUDACC__
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t stream, Args&&... args) {
  kernel<<<grid, block, shared, stream>>>(std::forward<Args>(args)...);
  return cudaGetLastError();
}

// The launch's dynamic shared memory; ask for it here, because the tests' host build has another
// way.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastrl_shared[];
  return reinterpret_cast<T*>(fastrl_shared);
}
#endif

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

}  // namespace cuda
}  // namespace fastrl

// What the host's stand-in for CUDA has to get right, as kernels whose answers are known.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.h"

using namespace fastrl::cuda;

// Sums a block: shuffles in a warp, static shared memory across warps, one atomic for each block.
__global__ void __launch_bounds__(128) sum_kernel(const float* x, int n, float* total) {
  __shared__ float partial[4];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float mine = i < n ? x[i] : 0.0f;
  for (int distance = 16; distance > 0; distance /= 2) {
    mine += __shfl_xor_sync(kAllLanes, mine, distance);
  }
  if (threadIdx.x % kWarp == 0) {
    partial[threadIdx.x / kWarp] = mine;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(total, partial[0] + partial[1] + partial[2] + partial[3]);
  }
}

// Turns each block's stretch of x around, through dynamic shared memory; `guarded` has the barrier.
__global__ void reverse_kernel(float* x, bool guarded) {
  float* copy = dynamic_shared<float>();
  const int t = threadIdx.x, last = blockDim.x - 1;
  copy[t] = x[blockIdx.x * blockDim.x + t];
  if (guarded) {
    __syncthreads();
  }
  x[blockIdx.x * blockDim.x + t] = copy[last - t];
}

// One number per lane for each primitive, in rows of 32.
__global__ void lanes_kernel(int* out) {
  const int lane = threadIdx.x;
  int row = 0;
  auto put = [&](int x) { out[kWarp * row++ + lane] = x; };
  put(__shfl_sync(kAllLanes, lane, 3));
  put(__shfl_sync(kAllLanes, lane, 1, 8));
  put(__shfl_down_sync(kAllLanes, lane, 5));
  put(__shfl_up_sync(kAllLanes, lane, 5));
  put(static_cast<int>(__ballot_sync(kAllLanes, lane % 2)));
  put(__any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 31));
  put(__reduce_max_sync(kAllLanes, lane * 7 % 32));
  if (lane < 16) {  // half a warp on its own
    put(__reduce_add_sync(0xffffu, lane));
  } else {
    put(__ffs(lane) * 100 + __popc(lane));
  }
  put(static_cast<int>(1000 * __bfloat162float(__float2bfloat16(1.0f + lane / 256.0f))));
  put(static_cast<int>(10000 * __half2float(__float2half(1.0f + lane / 2048.0f))));
}

__global__ void stuck_kernel() {
  if (threadIdx.x < 8) {
    __syncwarp();
  }
}

extern "C" {
int sum(const float* x, int n, float* total) {
  return launch(sum_kernel, dim3((n + 127) / 128), dim3(128), 0, nullptr, x, n, total);
}
int reverse(float* x, int blocks, int threads, int floats, bool guarded) {
  return launch(reverse_kernel, dim3(blocks), dim3(threads), floats * sizeof(float), nullptr, x,
                guarded);
}
int lanes(int* out) { return launch(lanes_kernel, dim3(1), dim3(32), 0, nullptr, out); }
int stuck() { return launch(stuck_kernel, dim3(1), dim3(32), 0, nullptr); }
int empty() { return launch(stuck_kernel, dim3(0), dim3(32), 0, nullptr); }
}

// Two passes over a tile of logits at memory speed.
//
// Fold: a block walks one row, its warps side by side, each lane four columns at a time:
//
//   columns  | warp 0: 128 | warp 1: 128 | ... | warp 7: 128 | warp 0 ...   kVectors of these loads
//            | lane 0: 4 | lane 1: 4 | ...                                  are in flight
//            |  stripe of 64  |  stripe of 64  |                            16 lanes, one maximum
//
// Exponentials count from their stripe's maximum, which is what the workspace keeps: the highest
// logit of a stripe is exactly 1 there. Lanes, warps and then tiles merge in one fixed order.
//
// Gradient: elementwise; p = exp(z - lse), from the logits or from the workspace, gives
// p (of_p - of_spread (log p + entropy)), and of_target more at the target.
#include "logprob.h"

#include <type_traits>

#include "convert.h"
#include "launch.h"

namespace fastrl {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kWide = 4;     // columns of a lane: 16 bytes of logits
constexpr int kVectors = 4;  // loads in flight
constexpr int kStripe = 64, kStripeLanes = kStripe / kWide;
constexpr int kStep = kThreads * kWide;  // columns of a block at once
constexpr float kLowest = -1e30f;        // stands for -inf: finite, so that 0 times it is 0

template <class T>
struct alignas(sizeof(T) * kWide) Pack {
  T x[kWide];
};

// A row's part of the workspace, from an entry of the vocabulary on, and its stripe's maximum.
template <class T>
__device__ inline Pack<T>& kept_exps(const KeptArgs& kept, int64_t row, int64_t entry) {
  return *reinterpret_cast<Pack<T>*>(static_cast<T*>(kept.exps) + row * kept.stride + entry);
}
__device__ inline float& kept_highest(const KeptArgs& kept, int64_t row, int64_t entry) {
  return kept.highest[entry / kStripe * kept.highest_stride + row];
}

// The logits before the temperature.
__device__ inline float capped(const TileArgs& a, float product, int64_t column) {
  if (a.bias) {
    product += fmaxf(a.bias[column], kLowest);
  }
  const float z = product * a.logit_scale;
  return a.softcap != 0.0f
             ? a.softcap * (1.0f - __fdividef(2.0f, __expf(2.0f * (z / a.softcap)) + 1.0f))
             : z;
}

// The maximum of some logits and, from it, the sums of exp z and z exp z.
struct Running {
  float highest, total, weighted;
};

__device__ inline Running merge(const Running& a, const Running& b) {
  const float highest = fmaxf(a.highest, b.highest);
  const float down_a = a.highest - highest, down_b = b.highest - highest;
  const float factor_a = __expf(down_a), factor_b = __expf(down_b);
  return {highest, a.total * factor_a + b.total * factor_b,
          (a.weighted + down_a * a.total) * factor_a + (b.weighted + down_b * b.total) * factor_b};
}

template <class T>
__device__ inline void fold_vector(const TileArgs& a, const KeptArgs& kept, int64_t row,
                                   int64_t column, const float* product, float inv_temperature,
                                   int64_t target, float* at_target, Running& running) {
  float z[kWide], top = kLowest;
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    const bool inside = column + k < a.columns;
    z[k] = inside ? capped(a, product[k], a.first + column + k) * inv_temperature : kLowest;
    if (inside && a.first + column + k == target) {
      *at_target = z[k];
    }
    top = fmaxf(top, z[k]);
  }
#pragma unroll
  for (int lanes = 1; lanes < kStripeLanes; lanes *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
  }
  Running part{top, 0.0f, 0.0f};
  Pack<T> exps;
#pragma unroll
  for (int k = 0; k < kWide; ++k) {
    const float down = z[k] - top, e = __expf(down);
    part.total += e;
    part.weighted += e * down;
    exps.x[k] = narrow<T>(e * kept.scale);
  }
  const int64_t entry = a.first + column;
  if (kept.exps && entry < kept.stride) {  // the workspace is as wide as its rows are apart
    kept_exps<T>(kept, row, entry) = exps;
    if (threadIdx.x % kStripeLanes == 0) {
      kept_highest(kept, row, entry) = top;
    }
  }
  running = merge(running, part);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) fold_kernel(LogprobFoldArgs args) {
  const TileArgs& a = args.logits;
  const int64_t row = blockIdx.x;
  const float* product = a.product + row * a.stride;
  const float inv_temperature = a.inv_temperature[row];
  const int64_t target = a.target[row];
  Running running{kLowest, 0.0f, 0.0f};
  // Every lane takes every turn, because lanes exchange maxima.
  for (int64_t begin = 0; begin < a.columns; begin += kVectors * kStep) {
    const int64_t mine = begin + threadIdx.x * kWide;
    Pack<float> x[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t column = mine + i * kStep;
      x[i] = column < a.columns ? *reinterpret_cast<const Pack<float>*>(product + column)
                                : Pack<float>{};
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (begin + i * kStep < a.columns) {
        fold_vector<T>(a, args.kept, row, mine + i * kStep, x[i].x, inv_temperature, target,
                       args.at_target + row, running);
      }
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Running other{__shfl_xor_sync(kAllLanes, running.highest, lanes),
                        __shfl_xor_sync(kAllLanes, running.total, lanes),
                        __shfl_xor_sync(kAllLanes, running.weighted, lanes)};
    running = threadIdx.x & lanes ? merge(other, running) : merge(running, other);
  }
  __shared__ Running of_warp[kWarps];
  if (threadIdx.x % kWarp == 0) {
    of_warp[threadIdx.x / kWarp] = running;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    running = a.first == 0 ? Running{kLowest, 0.0f, 0.0f}
                           : Running{args.highest[row], args.total[row], args.weighted[row]};
    for (int w = 0; w < kWarps; ++w) {
      running = merge(running, of_warp[w]);
    }
    args.highest[row] = running.highest;
    args.total[row] = running.total;
    args.weighted[row] = running.weighted;
  }
}

// T is the type of the workspace where kKept, and Out that of the gradient.
template <bool kKept, class T, class Out>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(LogprobGradientArgs args, int64_t blocks_per_row) {
  const TileArgs& a = args.logits;
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t mine = blockIdx.x % blocks_per_row * (kVectors * kStep) + threadIdx.x * kWide;
  const float inv_temperature = a.inv_temperature[row], lse = args.lse[row];
  const float of_spread = args.of_spread[row], of_target = args.of_target[row];
  const float of_row = args.of_p[row] - of_spread * args.entropy[row];
  const int64_t target = a.target[row];

  Pack<float> x[kVectors];
  float top[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t column = mine + i * kStep, entry = a.first + column;
    x[i] = Pack<float>{};
    top[i] = 0.0f;
    if (column < a.columns) {
      if (kKept) {
        const Pack<T> e = kept_exps<T>(args.kept, row, entry);
#pragma unroll
        for (int k = 0; k < kWide; ++k) {
          x[i].x[k] = widen(e.x[k]) / args.kept.scale;
        }
        top[i] = kept_highest(args.kept, row, entry);
      } else {
        x[i] = *reinterpret_cast<const Pack<float>*>(a.product + row * a.stride + column);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t column = mine + i * kStep;
    if (column >= a.columns) {
      break;
    }
    Pack<Out> g;
#pragma unroll
    for (int k = 0; k < kWide; ++k) {
      const int64_t entry = a.first + column + k;
      float log_p;
      if (column + k >= a.columns) {
        log_p = kLowest;  // beyond the vocabulary: padding that gets 0
      } else if (kKept) {
        // The target's probability is not rounded: 1 - p has to be right where p is nearly 1.
        log_p = entry == target    ? args.logprob[row]
                : x[i].x[k] > 0.0f ? __logf(x[i].x[k]) + (top[i] - lse)
                                   : kLowest;
      } else {
        log_p = capped(a, x[i].x[k], entry) * inv_temperature - lse;
      }
      float slope = __expf(log_p) * (of_row - of_spread * log_p);
      if (entry == target) {
        slope += of_target;
      }
      if (a.softcap != 0.0f) {
        const float tanh = (log_p + lse) / (inv_temperature * a.softcap);
        slope *= fmaxf(1.0f - tanh * tanh, 0.0f);
      }
      g.x[k] = narrow<Out>(column + k < a.columns ? slope : 0.0f);
    }
    *reinterpret_cast<Pack<Out>*>(static_cast<Out*>(args.gradient) + row * args.stride + column) =
        g;
  }
}

// f(T()) with the type's own T.
template <class F>
int with_type(Float type, const F& f) {
  switch (type) {
    case Float::f32:
      return f(float());
    case Float::bf16:
      return f(__nv_bfloat16());
    case Float::f16:
      return f(__half());
  }
  return cudaErrorInvalidValue;
}

bool fits(int64_t stride, int64_t columns) { return stride % kWide == 0 && stride >= columns; }

}  // namespace

int linear_logprob_fold(const LogprobFoldArgs& args, void* stream) {
  const TileArgs& a = args.logits;
  if (!fits(a.stride, a.columns) || a.first % kStripe != 0 || args.kept.stride % kStripe != 0) {
    return cudaErrorInvalidValue;
  }
  if (a.rows == 0 || a.columns == 0) {
    return cudaSuccess;
  }
  return with_type(args.kept.type, [&](auto t) {
    return launch(fold_kernel<decltype(t)>, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), args);
  });
}

int linear_logprob_gradient(const LogprobGradientArgs& args, void* stream) {
  const TileArgs& a = args.logits;
  const bool kept = args.kept.exps != nullptr;
  if (!fits(args.stride, a.columns) || !fits(kept ? args.kept.stride : a.stride, a.columns) ||
      a.first % kStripe != 0) {
    return cudaErrorInvalidValue;
  }
  if (a.rows == 0 || a.columns == 0) {
    return cudaSuccess;
  }
  const int64_t blocks_per_row = (a.columns + kVectors * kStep - 1) / (kVectors * kStep);
  const auto run = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(a.rows * blocks_per_row)), dim3(kThreads), 0,
                  static_cast<cudaStream_t>(stream), args, blocks_per_row);
  };
  return with_type(args.type, [&](auto out) -> int {
    using Out = decltype(out);
    if (!kept) {
      return run(gradient_kernel<false, float, Out>);
    }
    return with_type(args.kept.type, [&](auto t) -> int {
      using T = decltype(t);
      if constexpr (std::is_same<T, Out>::value || std::is_same<Out, float>::value) {
        return run(gradient_kernel<true, T, Out>);
      }
      return cudaErrorInvalidValue;  // the workspace is in the type of the operands
    });
  });
}

}  // namespace cuda
}  // namespace fastrl

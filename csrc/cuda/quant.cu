// 4-bit weights as floats, at memory speed: code[index] * absmax, rounded once to the output's
// type.
//
// A thread has eight elements as they are stored, four bytes of them; neighbours have neighbouring
// ones, whatever the rows are. Rows that are stored longer than they are (int4) lose their ends:
//
//   stored  | row 0: columns      | end | row 1: columns      | end |
//           | 8 | 8 | 8 | 8 | 8 | 8 | 8 | 8 | ...                       one thread each
#include "quant.h"

#include "convert.h"
#include "launch.h"

namespace fastrl {
namespace cuda {
namespace {

constexpr int kThreads = 256, kCodes = 16;
constexpr int kRun = 8;  // elements of a thread

template <class T>
struct alignas(sizeof(T) * kRun < 16 ? sizeof(T) * kRun : 16) Run {
  T x[kRun];
};

// Not contracted: the bits are those of a product and a sum.
__device__ inline float absmax_of(const QuantWeight& w, int64_t block) {
  if (!w.nested_absmax) {
    return static_cast<const float*>(w.absmax)[block];
  }
  const float code = w.nested_code[static_cast<const uint8_t*>(w.absmax)[block]];
  return __fadd_rn(__fmul_rn(code, w.nested_absmax[block / 256]), *w.nested_offset);
}

// kWhole: the eight elements of a thread share an absmax.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const QuantWeight w, T* out, int64_t stored, bool aligned) {
  __shared__ float code[kCodes];
  if (threadIdx.x < kCodes) {
    code[threadIdx.x] = w.code[threadIdx.x];
  }
  __syncthreads();
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRun;
  if (begin >= stored) {
    return;
  }
  const int count = stored - begin < kRun ? static_cast<int>(stored - begin) : kRun;
  uint32_t bytes = 0;
  if (aligned && count == kRun) {
    bytes = *reinterpret_cast<const uint32_t*>(w.data + begin / 2);
  } else {
    for (int b = 0; b < (count + 1) / 2; ++b) {
      bytes |= static_cast<uint32_t>(w.data[begin / 2 + b]) << (8 * b);
    }
  }
  float absmax = kWhole ? absmax_of(w, begin / w.block) : 0.0f;
  Run<T> run;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    if (j < count) {
      if (!kWhole && (j == 0 || (begin + j) % w.block == 0)) {
        absmax = absmax_of(w, (begin + j) / w.block);
      }
      // The first of a byte's two elements is in its high half.
      const uint32_t index = bytes >> (8 * (j / 2) + 4 * (1 - j % 2)) & 15u;
      run.x[j] = narrow<T>(code[index] * absmax);
    }
  }
  if (w.stride == w.columns && count == kRun) {
    *reinterpret_cast<Run<T>*>(out + begin) = run;
    return;
  }
  int64_t row = begin / w.stride, column = begin % w.stride;
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    if (j < count && column < w.columns) {
      out[row * w.columns + column] = run.x[j];
    }
    if (++column == w.stride) {
      ++row;
      column = 0;
    }
  }
}

template <class T>
int dequantize_to(const QuantWeight& w, void* out, cudaStream_t stream) {
  const int64_t stored = w.rows * w.stride;
  if (stored == 0) {
    return cudaSuccess;  // a grid of zero blocks is an error
  }
  const auto kernel =
      w.block % kRun == 0 ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
  const int64_t blocks = (stored + kThreads * kRun - 1) / (kThreads * kRun);
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % alignof(uint32_t) == 0;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, w,
                static_cast<T*>(out), stored, aligned);
}

}  // namespace

int dequantize(const DequantizeArgs& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.weight.scheme != QuantWeight::Scheme::four_bit) {
    return cudaErrorInvalidValue;
  }
  switch (a.out_type) {
    case Float::bf16:
      return dequantize_to<__nv_bfloat16>(a.weight, a.out, on);
    case Float::f16:
      return dequantize_to<__half>(a.weight, a.out, on);
    default:
      return dequantize_to<float>(a.weight, a.out, on);
  }
}

}  // namespace cuda
}  // namespace fastrl

// Reverse scans on a GPU: one warp per segment, one pass over the inputs, memory speed.
//
// A token is an affine map of what follows it, acc[t] = c[t] acc[t+1] + d[t], and maps compose:
// (c, d) after (c', d') is (c c', c d' + d). A warp walks its segment from the end in steps of
// kChunks chunks of 32 tokens, loads them all before it needs the first, and scans each chunk in
// five shuffles:
//
//   begin |. . . [chunk 3][chunk 2][chunk 1][chunk 0]| end      lane l of chunk k holds token
//                <----------- one step -------------->          end - 32 (k + 1) + l: coalesced
//
// A masked token is the identity map (1, 0). Chunks count from the segment's end and are folded in
// order, so a segment's bits depend neither on its batch nor on kChunks.
#include "scan.h"

#include "launch.h"

namespace fastrl {
namespace cuda {
namespace {

constexpr int kChunks = 8;
constexpr int kWarpsPerBlock = 4;

// What the tokens left of a chunk need to know of it.
struct Carry {
  float value, acc, target;
};

// The quantity at the next valid token to the right of each lane, and `carry` where there is none.
__device__ inline float next_valid(float x, unsigned valid_lanes, int lane, float carry) {
  const unsigned later = valid_lanes & (0xfffffffeu << lane);
  const float next = __shfl_sync(kAllLanes, x, later ? __ffs(later) - 1 : lane);
  return later ? next : carry;
}

// The quantity at the first valid token of the chunk, and `carry` where there is none.
__device__ inline float first_valid(float x, unsigned valid_lanes, float carry) {
  const float first = __shfl_sync(kAllLanes, x, valid_lanes ? __ffs(valid_lanes) - 1 : 0);
  return valid_lanes ? first : carry;
}

// acc of every lane: the maps of this lane and all lanes to its right, applied to the carry.
__device__ inline float scan_chunk(float c, float d, int lane, float carry) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const float c_right = __shfl_down_sync(kAllLanes, c, distance);
    const float d_right = __shfl_down_sync(kAllLanes, d, distance);
    if (lane + distance < kWarp) {
      d += c * d_right;
      c *= c_right;
    }
  }
  return d + c * carry;
}

// An op: how many arrays it reads and writes, what it carries in from beyond the segment, and one
// chunk.
struct Gae {
  static constexpr int kIn = 2, kOut = 2;
  const float* in[kIn];
  float* out[kOut];
  float gamma, gamma_lam;

  __device__ static Carry start(float bootstrap) { return {bootstrap, 0.0f, 0.0f}; }
  __device__ void chunk(const float* x, bool valid, unsigned valid_lanes, int lane, Carry& carry,
                        float* y) const {
    const float next_value = next_valid(x[1], valid_lanes, lane, carry.value);
    const float delta = x[0] + gamma * next_value - x[1];
    y[0] = scan_chunk(valid ? gamma_lam : 1.0f, valid ? delta : 0.0f, lane, carry.acc);
    y[1] = y[0] + x[1];
    carry.value = first_valid(x[1], valid_lanes, carry.value);
    carry.acc = __shfl_sync(kAllLanes, y[0], 0);
  }
};

struct Returns {
  static constexpr int kIn = 1, kOut = 1;
  const float* in[kIn];
  float* out[kOut];
  float gamma;

  __device__ static Carry start(float bootstrap) { return {0.0f, bootstrap, 0.0f}; }
  __device__ void chunk(const float* x, bool valid, unsigned, int lane, Carry& carry,
                        float* y) const {
    y[0] = scan_chunk(valid ? gamma : 1.0f, valid ? x[0] : 0.0f, lane, carry.acc);
    carry.acc = __shfl_sync(kAllLanes, y[0], 0);
  }
};

struct Vtrace {
  static constexpr int kIn = 4, kOut = 2;
  const float* in[kIn];
  float* out[kOut];
  float gamma, gamma_lam, rho_bar, c_bar;

  __device__ static Carry start(float bootstrap) { return {bootstrap, 0.0f, bootstrap}; }
  __device__ void chunk(const float* x, bool valid, unsigned valid_lanes, int lane, Carry& carry,
                        float* y) const {
    const float ratio = expf(x[2] - x[3]);
    // Written so that a NaN ratio stays NaN; fminf would hide it.
    const float rho = rho_bar < ratio ? rho_bar : ratio, c = c_bar < ratio ? c_bar : ratio;
    const float next_value = next_valid(x[1], valid_lanes, lane, carry.value);
    const float delta = rho * (x[0] + gamma * next_value - x[1]);
    const float acc =
        scan_chunk(valid ? gamma_lam * c : 1.0f, valid ? delta : 0.0f, lane, carry.acc);
    y[0] = acc + x[1];
    const float next_target = next_valid(y[0], valid_lanes, lane, carry.target);
    y[1] = rho * (x[0] + gamma * next_target - x[1]);
    carry.value = first_valid(x[1], valid_lanes, carry.value);
    carry.target = first_valid(y[0], valid_lanes, carry.target);
    carry.acc = __shfl_sync(kAllLanes, acc, 0);
  }
};

template <class Op>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) scan_kernel(Op op, Segments at) {
  const int lane = threadIdx.x % kWarp;
  const int64_t s = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (s >= at.segments) {
    return;  // the whole warp leaves: no lane is missed in a shuffle
  }
  const int64_t begin = at.offsets ? at.offsets[s] : s * at.length;
  const int64_t end = at.offsets ? at.offsets[s + 1] : begin + at.length;
  Carry carry = Op::start(at.bootstrap ? at.bootstrap[s] : 0.0f);

  for (int64_t tail = end; tail > begin; tail -= kChunks * kWarp) {
    float x[kChunks][Op::kIn];
    bool valid[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t i = tail - kWarp * (k + 1) + lane;
      const bool inside = i >= begin;
      valid[k] = inside && (!at.mask || at.mask[i]);
#pragma unroll
      for (int a = 0; a < Op::kIn; ++a) {
        x[k][a] = inside ? op.in[a][i] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t i = tail - kWarp * (k + 1) + lane;
      float y[Op::kOut];
      op.chunk(x[k], valid[k], __ballot_sync(kAllLanes, valid[k]), lane, carry, y);
#pragma unroll
      for (int b = 0; b < Op::kOut; ++b) {
        if (i >= begin) {
          op.out[b][i] = valid[k] ? y[b] : 0.0f;
        }
      }
    }
  }
}

template <class Op>
int scan(const Op& op, const Segments& at, void* stream) {
  if (at.segments == 0) {
    return cudaSuccess;  // a grid of zero blocks is an error
  }
  const int64_t blocks = (at.segments + kWarpsPerBlock - 1) / kWarpsPerBlock;
  return launch(scan_kernel<Op>, dim3(static_cast<unsigned>(blocks)), dim3(kWarp * kWarpsPerBlock),
                0, static_cast<cudaStream_t>(stream), op, at);
}

}  // namespace

int gae(const GaeArgs& a, void* stream) {
  return scan(Gae{{a.rewards, a.values}, {a.advantages, a.returns}, a.gamma, a.gamma_lam}, a.at,
              stream);
}

int returns(const ReturnsArgs& a, void* stream) {
  return scan(Returns{{a.rewards}, {a.returns}, a.gamma}, a.at, stream);
}

int vtrace(const VtraceArgs& a, void* stream) {
  return scan(Vtrace{{a.rewards, a.values, a.logprobs, a.old_logprobs},
                     {a.targets, a.advantages},
                     a.gamma,
                     a.gamma_lam,
                     a.rho_bar,
                     a.c_bar},
              a.at, stream);
}

}  // namespace cuda
}  // namespace fastrl

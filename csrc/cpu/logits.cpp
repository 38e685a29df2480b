// Log-probs of given logits on a CPU: the logits are read once forward, and read and their gradient
// written once backward.
//
// A row is cut into slices of kSlice entries, whatever its batch. A slice becomes floats in L1, is
// reduced to its maximum and sums there, while the next one is fetched, and the slices of a row are
// merged in order. Backward a slice of the gradient is finished before it is written, so it may
// take the place of the logits.
#include "logits.h"

#include <cfloat>
#include <cmath>

#include "pack.h"
#include "pool.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kSlice = 4096;
// Below this many logits waking a thread costs more than it saves.
constexpr int64_t kLogitsPerTask = 16384;

// Maximum of a slice and, relative to it, sum of exponentials and of z times them.
struct Part {
  float max, sum, weighted;
};

struct Slice {
  int64_t row, first, count;
};

inline int64_t slices_of(const LogitsArgs& a) { return ceil_div(a.vocab, kSlice); }

inline Slice slice_at(const LogitsArgs& a, int64_t row, int64_t s) {
  return {row, s * kSlice, std::min(kSlice, a.vocab - s * kSlice)};
}

inline const char* address(const LogitsArgs& a, int64_t row, int64_t v) {
  return static_cast<const char*>(a.logits) + (a.offset[row] + v) * bytes(a.type);
}

// The slice as floats, up to a whole vector of -inf.
inline void read(const LogitsArgs& a, const Slice& slice, float* x) {
  to_floats(address(a, slice.row, slice.first), a.type, slice.count, x);
  std::fill(x + slice.count, x + round_up(slice.count, kLanes), -kInfinity);
}

// What comes after the slice in memory, a vector at a time.
struct Ahead {
  const char* from;
  int64_t step;
  Ahead(const LogitsArgs& a, const Slice& slice)
      : from(address(a, slice.row, slice.first + slice.count)), step(bytes(a.type)) {}
  void fetch(int64_t i) const { __builtin_prefetch(from + i * step); }
};

inline Part reduce(const LogitsArgs& a, const Slice& slice, float* x) {
  read(a, slice, x);
  const Ahead ahead(a, slice);
  const float scale = a.inv_temperature[slice.row];
  Vec most = splat(-kInfinity);
  for (int64_t i = 0; i < slice.count; i += kLanes) {
    most = at_least(load(x + i), most);
  }
  Part part = {-FLT_MAX, 0.0f, 0.0f};
  for (int i = 0; i < kLanes; ++i) {
    part.max = std::max(part.max, most[i] * scale);
  }
  Vec sum = {}, weighted = {};
  for (int64_t i = 0; i < slice.count; i += kLanes) {
    ahead.fetch(i);
    const Vec below = at_least(fma(load(x + i), splat(scale), splat(-part.max)), splat(kLowest));
    const Vec e = exp_from_lowest(below);
    sum += e;
    weighted = fma(below, e, weighted);
  }
  for (int i = 0; i < kLanes; ++i) {
    part.sum += sum[i];
    part.weighted += weighted[i];
  }
  return part;
}

void finish(const LogitsForwardArgs& args, int64_t row, const Part* parts) {
  const LogitsArgs& a = args.logits;
  float most = -FLT_MAX, sum = 0.0f, weighted = 0.0f;
  for (int64_t s = 0; s < slices_of(a); ++s) {
    most = std::max(most, parts[s].max);
  }
  for (int64_t s = 0; s < slices_of(a); ++s) {
    const float down = std::max(parts[s].max - most, kLowest), factor = std::exp(down);
    sum += parts[s].sum * factor;
    weighted += (parts[s].weighted + down * parts[s].sum) * factor;
  }
  // Only a NaN, or nothing but -inf, leaves the maximum where it started.
  const bool nothing = most == -FLT_MAX && sum == sum;
  const float log_sum = nothing ? -kInfinity : std::log(sum);
  args.lse[row] = most + log_sum;
  args.entropy[row] = nothing ? std::numeric_limits<float>::quiet_NaN() : log_sum - weighted / sum;
  for (int64_t k = row * a.targets; k < (row + 1) * a.targets; ++k) {
    float z;
    to_floats(address(a, row, a.target[k]), a.type, 1, &z);
    args.logprob[k] = z * a.inv_temperature[row] - most - log_sum;
  }
}

// Calls task(slice, scratch) for all slices, and done(row) behind those of a row.
template <class Task, class Done>
void each_slice(const LogitsArgs& a, int threads, const Task& task, const Done& done) {
  const int64_t slices = slices_of(a);
  if (a.rows >= 4 * threads) {  // a row stays with a thread
    const int64_t rows = std::max<int64_t>(kLogitsPerTask / std::max<int64_t>(a.vocab, 1), 1);
    parallel_for(ceil_div(a.rows, rows), threads, [&](int64_t t) {
      Buffer<float> scratch(kSlice);
      for (int64_t row = t * rows; row < std::min((t + 1) * rows, a.rows); ++row) {
        for (int64_t s = 0; s < slices; ++s) {
          task(slice_at(a, row, s), scratch.get());
        }
        done(row);
      }
    });
    return;
  }
  parallel_for(a.rows * slices, threads, [&](int64_t t) {
    Buffer<float> scratch(kSlice);
    task(slice_at(a, t / slices, t % slices), scratch.get());
  });
  for (int64_t row = 0; row < a.rows; ++row) {
    done(row);
  }
}

// x becomes the gradient of the slice's logits.
void differentiate(const LogitsBackwardArgs& args, const Slice& slice, float* x) {
  const LogitsArgs& a = args.logits;
  const Ahead ahead(a, slice);
  const int64_t row = slice.row;
  const float scale = a.inv_temperature[row], lse = args.lse[row], entropy = args.entropy[row];
  float of_p = args.grad_lse[row];
  for (int64_t k = row * a.targets; k < (row + 1) * a.targets; ++k) {
    of_p -= args.grad_logprob[k];
  }
  const float of_spread = args.grad_entropy[row];
  for (int64_t i = 0; i < slice.count; i += kLanes) {
    ahead.fetch(i);
    const Vec logp = at_least(fma(load(x + i), splat(scale), splat(-lse)), splat(kLowest));
    // Not what is beyond the lowest, but NaN.
    const Vec p = select(logp > splat(kLowest), exp_from_lowest(logp), logp * 0.0f);
    store(x + i, p * (of_p - of_spread * (logp + entropy)) * scale);
  }
  for (int64_t k = row * a.targets; k < (row + 1) * a.targets; ++k) {
    const int64_t v = a.target[k] - slice.first;
    if (v >= 0 && v < slice.count) {
      x[v] += args.grad_logprob[k] * scale;
    }
  }
}

}  // namespace

void logits_logprob_fwd(const LogitsForwardArgs& args, int threads) {
  const LogitsArgs& a = args.logits;
  Buffer<Part> parts(a.rows * slices_of(a));
  const auto part = [&](int64_t row, int64_t s) { return parts.get() + row * slices_of(a) + s; };
  each_slice(
      a, threads,
      [&](const Slice& slice, float* x) {
        *part(slice.row, slice.first / kSlice) = reduce(a, slice, x);
      },
      [&](int64_t row) { finish(args, row, part(row, 0)); });
}

void logits_logprob_bwd(const LogitsBackwardArgs& args, int threads) {
  const LogitsArgs& a = args.logits;
  each_slice(
      a, threads,
      [&](const Slice& slice, float* x) {
        read(a, slice, x);
        differentiate(args, slice, x);
        from_floats(
            x, a.type, slice.count,
            static_cast<char*>(args.grad) + (slice.row * a.vocab + slice.first) * bytes(a.type));
      },
      [](int64_t) {});
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

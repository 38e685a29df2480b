// Running statistics of the logits' softmax, a lane per token: what a block of logits is folded
// into, and how the vocabulary's chunks are merged, in the namespace of the instruction set.
#pragma once

#include <cfloat>
#include <cmath>

#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kChunks = 64;  // of the vocabulary

// Vocabulary rows of a chunk: they depend on V alone, and so does what is summed with what.
inline int64_t chunk_rows(int64_t vocab) { return round_up(ceil_div(vocab, kChunks), kBlock); }

// Running maximum and, relative to it, sum of exponentials and of z times them; a lane per token.
struct Running {
  float max[kPanel], sum[kPanel], weighted[kPanel];
};

inline void fold(const float* z, int n, int vectors, const float* inv_temperature, bool first,
                 Running& to) {
  for (int j = 0; j < vectors; ++j) {
    const int at = j * kLanes;
    const Vec scale = load(inv_temperature + at);
    Vec highest = splat(-kInfinity);
    for (int r = 0; r < n; ++r) {
      highest = at_least(load(z + r * kPanel + at), highest);
    }
    // Finite also where all are -inf.
    highest = at_least(highest * scale, splat(-FLT_MAX));
    Vec sum = {}, weighted = {};
    if (!first) {
      const Vec before = load(to.max + at);
      highest = at_least(before, highest);
      const Vec down = at_least(before - highest, splat(kLowest)), factor = exp_from_lowest(down);
      sum = load(to.sum + at) * factor;
      weighted = (load(to.weighted + at) + down * load(to.sum + at)) * factor;
    }
    for (int r = 0; r < n; ++r) {
      const Vec x = at_least(fma(load(z + r * kPanel + at), scale, -highest), splat(kLowest));
      const Vec e = exp_from_lowest(x);
      sum += e;
      weighted = fma(x, e, weighted);
    }
    store(to.max + at, highest);
    store(to.sum + at, sum);
    store(to.weighted + at, weighted);
  }
}

// One token's statistics: its maximum and, relative to it, the sums and the sum's logarithm.
struct Merged {
  float max, sum, weighted, log_sum;
};

// Lane i of the `chunks` parts, `stride` apart, in order.
inline Merged merge(const Running* parts, int64_t chunks, int64_t stride, int64_t i) {
  Merged all = {-FLT_MAX, 0.0f, 0.0f, 0.0f};
  for (int64_t c = 0; c < chunks; ++c) {
    all.max = std::max(all.max, parts[c * stride].max[i]);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const Running& part = parts[c * stride];
    const float down = std::max(part.max[i] - all.max, kLowest), factor = std::exp(down);
    all.sum += part.sum[i] * factor;
    all.weighted += (part.weighted[i] + down * part.sum[i]) * factor;
  }
  all.log_sum = std::log(all.sum);
  return all;
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

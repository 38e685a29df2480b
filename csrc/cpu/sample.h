// One token per row drawn from the lm-head's softmax, with its log-probability.
//
// z as in logprob.h, at the temperature sampled with. The token is argmax_v z_v + gumbel(seed,
// position, v) over the entries that truncation keeps, or argmax_v z_v when greedy.
#pragma once

#include "logprob.h"

namespace fastrl {

struct SampleArgs {
  LinearArgs linear;                 // without target; greedy wants inv_temperature 1
  const int64_t *seeds, *positions;  // [M]
  bool greedy;
  int64_t top_k;        // 0 for all
  double top_p, min_p;  // 1 and 0 for all
  int64_t* token;       // [M]
  float* logprob;       // [M] under the distribution sampled from; 0 when greedy
  float* untruncated;   // [M] under the untruncated one
};

#define FASTRL_DECLARE_SAMPLE(isa)                         \
  namespace isa {                                          \
  void linear_sample(const SampleArgs& args, int threads); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_SAMPLE)

}  // namespace fastrl

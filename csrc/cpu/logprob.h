// Log-probability, logsumexp and entropy of the lm-head's softmax without the [N, V] logits.
//
// z = softcap * tanh(logit_scale * (hidden weight^T + bias) / softcap) * inv_temperature
// logprob = z[target] - lse, lse = log sum_v exp z_v, entropy = lse - sum_v softmax(z)_v z_v
#pragma once

#include <cstdint>

#include "float.h"
#include "isa.h"

namespace fastrl {

struct LinearArgs {
  int64_t rows, width, vocab;  // N, H, V
  const void* hidden;          // [N, H], contiguous
  Float hidden_type;
  const void* weight;  // [V, H], rows weight_stride elements apart
  Float weight_type;
  int64_t weight_stride;
  const float* bias;             // [V] or null
  const float* inv_temperature;  // [N]
  const int64_t* target;         // [N], each in [0, V)
  float logit_scale;
  float softcap;  // 0 for none
};

struct LogprobForwardArgs {
  LinearArgs linear;
  float *logprob, *lse, *entropy;  // [N]
};

struct LogprobBackwardArgs {
  LinearArgs linear;
  const float *lse, *entropy;                           // [N], what the forward gave
  const float *grad_logprob, *grad_lse, *grad_entropy;  // [N]
  void* grad_hidden;                                    // [N, H] contiguous in hidden_type, or null
  void* grad_weight;                                    // [V, H] contiguous in weight_type, or null
  float* grad_bias;                                     // [V] or null
};

#define FASTRL_DECLARE_LOGPROB(isa)                                      \
  namespace isa {                                                        \
  void linear_logprob_fwd(const LogprobForwardArgs& args, int threads);  \
  void linear_logprob_bwd(const LogprobBackwardArgs& args, int threads); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_LOGPROB)

}  // namespace fastrl

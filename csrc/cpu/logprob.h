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
  const int64_t* index;        // [N] which rows of hidden and of every [...]; null for the first N
  const void* hidden;          // [..., H], contiguous
  Float hidden_type;
  const void* weight;  // [V, H], rows weight_stride elements apart
  Float weight_type;
  int64_t weight_stride;
  const float* bias;             // [V] or null
  const float* inv_temperature;  // [...]
  const int64_t* target;         // [...], each in [0, V)
  float logit_scale;
  float softcap;  // 0 for none
  Int8Rows int8;  // of the weight, where it is; for linear_sample

  int64_t row(int64_t t) const { return index ? index[t] : t; }
};

// Memory that a call may hold, in bytes. `kept` carries exponentials of the logits, which the
// backward need not compute again, from the forward to it. Whether they are there or not, and how
// the rest is used, changes no bit of any result. In the memory of grad_weight they do not count:
// the backward has used a row's when it writes the row.
struct Workspace {
  int64_t limit;
  void* kept;
  int64_t kept_bytes;  // at most
  bool in_gradient;    // kept is grad_weight's memory, whether that is asked for or not
};

// Where hidden's gradient alone is wanted, the forward can leave what it is made of, and the
// backward multiplies nothing:
//
//   means = sum_{v != target} softmax(z)_v dz_v/dx_v weight_v        [..., H] floats
//
// with dz/dx a cap's derivative, before the temperature and the logit scale. Of the target there is
// nothing in it: 1 - p would be lost where p is nearly 1.
struct LogprobForwardArgs {
  LinearArgs linear;
  Workspace workspace;             // limit 0 where no backward follows, or one from the means
  float *logprob, *lse, *entropy;  // [...]
  float* means;                    // or null
};

struct LogprobBackwardArgs {
  LinearArgs linear;
  Workspace workspace;                                  // the forward's
  const float *logprob, *lse, *entropy, *means;         // [...], what the forward gave
  const float *grad_logprob, *grad_lse, *grad_entropy;  // [...]
  void* grad_hidden;  // [..., H] contiguous in hidden_type, or null
  void* grad_weight;  // [V, H] contiguous in weight_type, or null
  float* grad_bias;   // [V] or null
};

#define FASTRL_DECLARE_LOGPROB(isa)                                      \
  namespace isa {                                                        \
  void linear_logprob_fwd(const LogprobForwardArgs& args, int threads);  \
  void linear_logprob_bwd(const LogprobBackwardArgs& args, int threads); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_LOGPROB)

}  // namespace fastrl

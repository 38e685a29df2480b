// Log-probability, logsumexp and entropy of logits that somebody holds, and their gradient.
//
// z = logits * inv_temperature; logprob = z[target] - lse, lse = log sum_v exp z_v,
// entropy = lse - sum_v softmax(z)_v z_v
#pragma once

#include <cstdint>

#include "float.h"
#include "isa.h"

namespace fastrl {

struct LogitsArgs {
  int64_t rows, vocab, targets;  // N, V, K
  const void* logits;
  Float type;
  const int64_t* offset;         // [N], elements from `logits` to each row; a row is contiguous
  const float* inv_temperature;  // [N]
  const int64_t* target;         // [N, K], each in [0, V)
};

struct LogitsForwardArgs {
  LogitsArgs logits;
  float* logprob;        // [N, K]
  float *lse, *entropy;  // [N]
};

struct LogitsBackwardArgs {
  LogitsArgs logits;
  const float *lse, *entropy;            // [N], what the forward gave
  const float* grad_logprob;             // [N, K]
  const float *grad_lse, *grad_entropy;  // [N]
  void* grad;                            // [N, V] contiguous, of the logits' type; may be `logits`
};

#define FASTRL_DECLARE_LOGITS(isa)                                      \
  namespace isa {                                                       \
  void logits_logprob_fwd(const LogitsForwardArgs& args, int threads);  \
  void logits_logprob_bwd(const LogitsBackwardArgs& args, int threads); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_LOGITS)

}  // namespace fastrl

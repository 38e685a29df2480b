// Attention of completions to the prompt they share and, causally, to themselves.
//
// Tokens are packed as prompt | c_1 | ... | c_G, group after group. A query sees the keys of its
// group's prompt and of its own segment up to itself; with a window those of the last `window`
// positions, where a completion's positions start at its prompt's length.
#pragma once

#include <cstdint>

#include "float.h"
#include "isa.h"

namespace fastrl {

// [T, heads, D]: strides in elements, the elements of a row side by side.
struct Heads {
  const void* data;
  int64_t token_stride, head_stride;
};

struct AttentionArgs {
  int64_t tokens, heads, kv_heads, width;  // T, Hq, Hkv, D
  const int32_t* offsets;                  // tokens at which segments start, and their end
  const int32_t* group_offsets;            // [groups + 1] segments at which groups start
  int64_t groups;
  Float type;  // of everything but statistics
  Heads q, k, v;
  float scale;
  float softcap;   // 0 for none
  int64_t window;  // 0 for none
};

struct AttentionForwardArgs {
  AttentionArgs at;
  void* out;     // [T, Hq, D], contiguous
  int8_t* rest;  // [T, Hq, D] or null: what rounding took from out, see keep_rest
  float* lse;    // [T, Hq]
};

struct AttentionBackwardArgs {
  AttentionArgs at;
  Heads out;           // what the forward gave
  const int8_t* rest;  // likewise, or null
  const float* lse;    // [T, Hq]
  Heads grad_out;
  const float* grad_lse;           // [T, Hq] or null
  void *grad_q, *grad_k, *grad_v;  // shaped like q, k and v, contiguous
};

#define FASTRL_DECLARE_ATTENTION(isa)                                               \
  namespace isa {                                                                   \
  void shared_prefix_attention_fwd(const AttentionForwardArgs& args, int threads);  \
  void shared_prefix_attention_bwd(const AttentionBackwardArgs& args, int threads); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_ATTENTION)

}  // namespace fastrl

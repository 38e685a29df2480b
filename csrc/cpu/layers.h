// What a decoder layer computes between its matrix products, and the gradients: norms, rotations of
// heads by position and the gated activation. Rows of a floating type, computed in float32.
#pragma once

#include <cstdint>

#include "float.h"
#include "isa.h"

namespace fastrl {

// sum = x + residual, rounded to the type; out = sum * inverse * weight with
// inverse = 1 / sqrt(mean sum^2 + eps).
struct RmsnormArgs {
  int64_t rows, width;
  Float type;
  const void *x, *residual;  // [rows, width]; without a residual null, and sum is x
  const float* weight;       // [width], with the offset added; 0 behind it up to 16 floats
  float eps;
  void *sum, *out;
  float* inverse;  // [rows]
};

struct RmsnormBackwardArgs {
  int64_t rows, width;
  Float type;
  const void* sum;
  const float *weight, *inverse;
  const void *grad_out, *grad_sum;  // the latter may be null
  void* grad;                       // of x, and of the residual
  float* grad_weight;               // [width] or null
};

// Heads [tokens, heads, width], of which element i turns with element i + width / 2:
//   out_i = n_i cos_i - n_j sin_i,  out_j = n_j cos_i + n_i sin_i,  j = i + width / 2
// where n is x, or x normed as above.
struct RopeArgs {
  int64_t tokens, heads, width;
  Float type;
  const void* x;
  const float *cosine, *sine;  // [tokens, width / 2]
  const float* weight;         // of the norm, padded as above, or null
  float eps;
  void* out;
};

struct RopeBackwardArgs {
  RopeArgs at;  // but out
  const void* grad_out;
  void* grad;
  float* grad_weight;  // [width] or null
};

// out = act(gate) * up.
struct GluArgs {
  int64_t count;
  Float type;
  const void *gate, *up;
  bool gelu;  // act is GELU by tanh, else SiLU
  void* out;
};

struct GluBackwardArgs {
  GluArgs at;  // but out
  const void* grad_out;
  void *grad_gate, *grad_up;
};

#define FASTRL_DECLARE_LAYERS(isa)                             \
  namespace isa {                                              \
  void rmsnorm(const RmsnormArgs& args, int threads);          \
  void rmsnorm_bwd(const RmsnormBackwardArgs& a, int threads); \
  void rope(const RopeArgs& args, int threads);                \
  void rope_bwd(const RopeBackwardArgs& args, int threads);    \
  void glu(const GluArgs& args, int threads);                  \
  void glu_bwd(const GluBackwardArgs& args, int threads);      \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_LAYERS)

}  // namespace fastrl

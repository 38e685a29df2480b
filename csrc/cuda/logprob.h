// linear_logprob around cuBLAS: a tile of float32 logits folded into a row's running statistics,
// and the gradient of a tile. The products are the caller's.
//
// z = softcap * tanh(logit_scale * (product + bias) / softcap) * inv_temperature
//
// Each returns a cudaError_t, 0 for success.
#pragma once

#include <cstdint>

#include "../cpu/float.h"

namespace fastrl {

// A tile of the product hidden weight^T: columns [first, first + columns) of the vocabulary.
struct TileArgs {
  int64_t rows, columns, first;
  const float* product;  // [rows, columns], 16-byte aligned
  int64_t stride;        // between its rows: a multiple of 4 that holds columns rounded up to 4
  const float* bias;     // [V] or null
  const float* inv_temperature;  // [rows]
  const int64_t* target;         // [rows], each in [0, V)
  float logit_scale;
  float softcap;  // 0 for none
};

// The workspace: kept_scale * exp(z - highest of its stripe of 64 entries), from entry 0 on.
struct KeptArgs {
  void* exps;  // [rows, stride], or null for no workspace
  Float type;
  int64_t stride;          // a multiple of 4
  float* highest;          // [stripes, highest_stride]
  int64_t highest_stride;  // between stripes
  float scale;
};

struct LogprobFoldArgs {
  TileArgs logits;
  KeptArgs kept;
  // [rows]: the highest z so far, the sums of exp(z - highest) and of (z - highest) exp(z -
  // highest), and z of the target. The tile that starts at 0 begins them.
  float *highest, *total, *weighted, *at_target;
};

struct LogprobGradientArgs {
  TileArgs logits;  // product may be null where the workspace is read instead
  KeptArgs kept;
  const float *logprob, *lse, *entropy;       // [rows], what the forward gave
  const float *of_p, *of_spread, *of_target;  // [rows], holding 1 / temperature and logit_scale
  void* gradient;  // [rows, columns]; may be the product itself when it is float32
  Float type;
  int64_t stride;  // like that of the product
};

namespace cuda {

int linear_logprob_fold(const LogprobFoldArgs& args, void* stream);
int linear_logprob_gradient(const LogprobGradientArgs& args, void* stream);

}  // namespace cuda
}  // namespace fastrl

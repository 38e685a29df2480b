// A decoder-only transformer on a CPU: M rows, each one new token of a sequence whose earlier keys
// and values are cached, through all layers. Weights are read where the trainer keeps them.
//
// Per layer, with norm(x) = x / sqrt(mean x^2 + eps) * (norm_offset + weight):
//
//   a = attention(rope(q_norm(q h)), rope(k_norm(k h)), v h),  h = attention_norm(x)
//   x = x + post_attention_norm(o a)
//   x = x + post_mlp_norm(down (act(gate h) * up h)),          h = mlp_norm(x)
#pragma once

#include <cstdint>
#include <vector>

#include "arena.h"
#include "float.h"
#include "isa.h"
#include "sample.h"

namespace fastrl {

// weight x + bias
struct DecodeMatrix {
  const void* weight;  // [rows, depth], rows `stride` elements apart
  int64_t rows, depth, stride;
  const void* bias;  // [rows] or null
  Float type;        // of both
  Int8Rows int8;     // of the weight, where it is
};

// scaling * b(a(x)), whose types may differ from the model's.
struct LowRank {
  DecodeMatrix a, b;  // a: [rank, depth], no bias
  float scaling;
};

// y = weight x + bias, in the model's type (or int8), and what each adapter adds.
struct DecodeLinear : DecodeMatrix {
  std::vector<LowRank> adapters;

  int64_t rank() const {
    int64_t sum = 0;
    for (const LowRank& adapter : adapters) {
      sum += adapter.a.rows;
    }
    return sum;
  }
};

struct DecodeLayer {
  DecodeLinear q, k, v, o, gate, up, down;
  const void *attention_norm, *mlp_norm;            // [H]
  const void *post_attention_norm, *post_mlp_norm;  // [H] or null
  const void *q_norm, *k_norm;                      // [D] or null, of each head
  int64_t window;                                   // keys a query sees, its own included; 0: all
};

struct DecodeModel {
  int64_t width, heads, kv_heads, head_size;  // H, Hq, Hkv, D
  Float type;             // of parameters, but adapters', and of keys and values
  const void* embedding;  // [V, H], rows embedding_stride elements apart
  int64_t embedding_stride;
  float embedding_scale;
  const void* final_norm;  // [H]
  float eps, norm_offset;
  float attention_scale, softcap;  // of scores; softcap 0 for none
  bool gelu;                       // act is GELU by tanh, else SiLU
  bool int8;                       // layers' products, but adapters', and their weights
  std::vector<DecodeLayer> layers;
};

// Keys and values of consecutive positions of one sequence or of several that share them:
// [layers, 2, Hkv, capacity, D]. Row m sees the segments chain[chain_begin[m]] and on, each up to
// where the next one starts and the last up to the row's position. Into that one its key and value
// are written, before any row of the call reads.
struct DecodeArgs {
  int64_t rows;                            // M
  const int64_t *tokens, *positions;       // [M]
  const int64_t *base, *start, *capacity;  // per segment: address, first position, positions
  const int64_t* shared;                   // per segment: whether many rows may read it
  const int64_t *chain_begin, *chain;      // [M + 1]; segments
  const float *cosine, *sine;              // [positions, D / 2]
  void* hidden;                            // [M, H] after the final norm, in the model's type
};

using DecodeScratch = std::vector<Arena>;  // kept from call to call, used by one at a time

// Up to `steps` draws of each row, and between them the steps that read what was drawn. A row ends
// with a token of `stops` or when it has no room; the call returns when no more than `fewest` rows
// are left, or after about a tenth of a second.
struct GenerateArgs {
  DecodeArgs decode;  // tokens: what the rows drew last; null where they begin, with `hidden`
  SampleArgs sample;  // positions: of the first draw; token, logprob and untruncated: [M, steps]
  int64_t steps, fewest;
  const int64_t* room;  // [M] draws
  const int64_t* stops;
  int64_t stop_count;
  int64_t* count;  // [M], of draws made: the same of all rows that have not ended
};

#define FASTRL_DECLARE_DECODE(isa)                                                          \
  namespace isa {                                                                           \
  void decode(const DecodeModel& model, const DecodeArgs& args, DecodeScratch& scratch,     \
              int threads);                                                                 \
  void generate(const DecodeModel& model, const GenerateArgs& args, DecodeScratch& scratch, \
                int threads);                                                               \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_DECODE)

}  // namespace fastrl

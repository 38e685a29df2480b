// Reverse scans over token sequences: advantages and returns.
//
// A batch is `segments` independent runs of tokens in flat arrays. Segment s is
// [offsets[s], offsets[s + 1]), or [s * length, (s + 1) * length) when offsets is null.
// mask and bootstrap may be null: every token valid, nothing after the last token.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastrl {

struct Segments {
  int64_t segments;
  int64_t length;          // of each segment, when offsets is null
  const int32_t* offsets;  // [segments + 1] or null
  const uint8_t* mask;     // one byte per token, or null
  const float* bootstrap;  // [segments], or null
};

struct GaeArgs {
  Segments at;
  const float *rewards, *values;
  float *advantages, *returns;
  float gamma, gamma_lam;
};

struct ReturnsArgs {
  Segments at;
  const float* rewards;
  float* returns;
  float gamma;
};

struct VtraceArgs {
  Segments at;
  const float *rewards, *values, *logprobs, *old_logprobs;
  float *targets, *advantages;
  float gamma, gamma_lam, rho_bar, c_bar;
};

#define FASTRL_DECLARE_SCAN(isa)                      \
  namespace isa {                                     \
  void gae(const GaeArgs& args, int threads);         \
  void returns(const ReturnsArgs& args, int threads); \
  void vtrace(const VtraceArgs& args, int threads);   \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_SCAN)

}  // namespace fastrl

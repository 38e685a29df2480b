// Sums over a row of floats, in 16 lanes whatever the instruction set has: all compute the same
// bits.
#pragma once

#include "pack.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int kSixteen = 16, kParts = kSixteen / kLanes;

// The sum over k of term(k), vectors from k on, for k in [0, width) in steps of kLanes.
template <class Term>
inline float lane_sum(int64_t width, const Term& term) {
  Vec parts[kParts] = {};
  for (int64_t k = 0; k < width; k += kSixteen) {
    for (int p = 0; p < kParts; ++p) {
      parts[p] += term(k + p * kLanes);
    }
  }
  float lanes[kSixteen];
  std::memcpy(lanes, parts, sizeof lanes);
  for (int half = kSixteen / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

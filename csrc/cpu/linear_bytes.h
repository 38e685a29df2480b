// The lm-head's logits of an int8 weight (bytes.h).
#pragma once

#include "bytes.h"
#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

template <>
class Tokens<Int8> : public TokenRange {
 public:
  Tokens(const LinearArgs& a, int64_t capacity)
      : a_(a),
        words_(round_up(capacity, kPanel) * words(a.width)),
        scale_(round_up(capacity, kPanel)) {}

  void pack(int64_t first, int64_t count, int threads) {
    take(first, count);
    // Behind a row's last word lie zeros of the weight: any integers will do, but let them be some.
    std::memset(words_.get(), 0, panels() * kPanel * words(a_.width) * 4);
    parallel_for(ceil_div(count, kLanes), threads, [&](int64_t v) { pack_vector(v); });
  }

  // They are read where they lie.
  Rows weight_rows(int64_t, int, float*) const { return {}; }

  void logits(const Rows*, int64_t v0, int n, int64_t p, float* z) const {
    const int vectors = this->vectors(p);
    multiply_int8(
        a_.weight, a_.weight_stride, a_.int8, v0, n, a_.width,
        {{start(p), word_columns(vectors), vectors, tokens_of(count())}, scale_.get() + p * kPanel},
        z);
    to_logits(a_, v0, n, vectors, z);
  }

 private:
  uint32_t* start(int64_t p) const { return words_.get() + p * kPanel * words(a_.width); }

  void pack_vector(int64_t v) const {
    const int64_t p = v / kVectors, lane = v % kVectors * kLanes, width = a_.width;
    const Buffer<float> row(width), turned(width * kLanes);
    std::fill_n(turned.get(), width * kLanes, 0.0f);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, count() - v * kLanes); ++i) {
      const int64_t at = a_.row(first() + v * kLanes + i) * width * bytes(a_.hidden_type);
      to_floats(static_cast<const char*>(a_.hidden) + at, a_.hidden_type, width, row.get());
      for (int64_t k = 0; k < width; ++k) {
        turned[k * kLanes + i] = row[k];
      }
    }
    if (count() <= kFewRows) {
      return quantize_few(turned.get(), kLanes, width, count(), words_.get(), scale_.get());
    }
    quantize_lanes(turned.get(), kLanes, width, start(p) + lane, word_columns(vectors(p)),
                   scale_.get() + p * kPanel + lane);
  }

  const LinearArgs& a_;
  Buffer<uint32_t> words_;  // [panel][words(H)][columns]
  Buffer<float> scale_;     // [panel][kPanel]
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

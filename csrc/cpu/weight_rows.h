// Rows of the weight's gradient on their way from a panel of float sums to memory, in the namespace
// of the instruction set: with tiles a line at a time, beside the product of the panel that comes
// next. Neighbouring rows lie far apart, so a line is asked for when the one before it is written.
#pragma once

#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

class WeightRows {
 public:
  // Rows from v0 on of `to` [V, H], which has the type of the weight.
  WeightRows(const LinearArgs& a, void* to, int64_t v0)
      : type_(a.weight_type),
        width_(a.width),
        stride_(a.width * bytes(type_)),
        to_(static_cast<char*>(to) + v0 * stride_) {}

  // The sums of n rows and of the panel of columns from h on, [n, kPanel], are read until finish().
  // A product beside has so many steps.
  void start(const float* sums, int64_t n, int64_t h, int64_t steps) {
    run_ = {sums, to_ + h * bytes(type_), stride_, n, ceil_div(n, steps)};
    columns_ = std::min<int64_t>(kPanel, width_ - h);
  }

  struct Run {
    const float* sums;
    char* to;
    int64_t stride, rows, each;

    __attribute__((always_inline)) void step() {
#ifdef FASTRL_TILES
      for (int64_t i = 0; i < each && rows > 0; ++i) {
        const auto line = _mm512_cvtne2ps_pbh((__m512)load(sums + kLanes), (__m512)load(sums));
        std::memcpy(to, &line, sizeof line);
        __builtin_prefetch(to + sizeof line, 1, 2);
        skip();
      }
#endif
    }

    void skip() {
      sums += kPanel;
      to += stride;
      --rows;
    }
  };

  Run begin(int64_t) { return lines() ? run_ : Run{}; }

  void end(const Run& run) {
    if (lines()) {
      run_ = run;
    }
  }

  void finish() {
    for (; run_.rows > 0; run_.skip()) {
      from_floats(run_.sums, type_, columns_, run_.to);
    }
  }

 private:
  bool lines() const { return type_ == Float::bf16 && columns_ == kPanel; }

  const Float type_;
  const int64_t width_, stride_;
  char* const to_;
  Run run_ = {};
  int64_t columns_ = 0;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

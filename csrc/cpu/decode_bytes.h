// Products of a step in int8 (bytes.h). What enters and leaves them stays in floats.
#pragma once

#include "bytes.h"
#include "decode_panels.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Rows in floats until they are complete, then in words as well.
template <>
class Operand<Int8> {
 public:
  using Panel = BytePanel;

  Operand(Arena& arena, const Lanes& lanes, int64_t most)
      : lanes_(lanes),
        floats_(arena, lanes, most),
        words_(arena, lanes.panels() * words(most) * kPanel),
        scale_(arena, lanes.panels() * kPanel) {
    if (!lanes.full()) {
      std::memset(words_.get(), 0, lanes.panels() * words(most) * kPanel * 4);
    }
  }

  auto vector(int64_t v, int64_t depth) const { return floats_.vector(v, depth); }
  PanelView<float> unrounded(int64_t p, int64_t depth) const { return floats_.unrounded(p, depth); }
  Panel panel(int64_t p, int64_t depth) const {
    const int vectors = lanes_.vectors(p);
    return {{start(p, depth), word_columns(vectors), vectors, tokens_of(lanes_.rows)},
            scale_.get() + p * kPanel};
  }

  void complete(int64_t depth, int threads) const {
    const int helping = lanes_.rows * depth < kWorthWaking ? 1 : threads;
    parallel_for(lanes_.count(), helping, [&](int64_t v) {
      const int64_t p = v / kVectors, lane = v % kVectors * kLanes;
      const PanelView<float> x = unrounded(p, depth);
      if (lanes_.rows <= kFewRows) {
        return quantize_few(x.data, x.columns, depth, lanes_.rows, words_.get(), scale_.get());
      }
      quantize_lanes(x.data + lane, x.columns, depth, start(p, depth) + lane,
                     word_columns(lanes_.vectors(p)), scale_.get() + p * kPanel + lane);
    });
  }

 private:
  uint32_t* start(int64_t p, int64_t depth) const {
    return words_.get() + p * words(depth) * kPanel;
  }

  const Lanes lanes_;
  const Operand<Floats> floats_;
  Borrowed<uint32_t> words_;
  Borrowed<float> scale_;
};

template <>
class BlockProduct<Int8> {
 public:
  static constexpr bool kTiles = false;

  explicit BlockProduct(const DecodeMatrix& w) : w_(w), bias_(w) {}

  void take(int64_t r0, int n, char*) {
    r0_ = r0;
    n_ = n;
  }

  bool exact() const { return false; }

  void with(const BytePanel& panel, float* z, bool) const {
    multiply_int8(w_.weight, w_.stride, w_.int8, r0_, n_, w_.depth, panel, z);
    bias_.add(r0_, n_, panel.vectors, z);
  }

 private:
  const DecodeMatrix& w_;
  const Bias bias_;
  int64_t r0_ = 0;
  int n_ = 0;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

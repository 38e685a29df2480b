// Running statistics of the logits' softmax, a lane per token: what a block of logits is folded
// into, and how the vocabulary's chunks are merged, in the namespace of the instruction set.
#pragma once

#include <cfloat>
#include <cmath>

#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Rows of a weight that a product has as its depth: as floats they fill a cache, not more.
inline int64_t rows_together(int64_t width) {
  constexpr int64_t kFloats = 3 << 19;
  return round_up(std::clamp<int64_t>(kFloats / width, 1, 768), 2 * kBlock);
}

// Vocabulary rows of a chunk, which has running statistics of its own: they depend on V and H
// alone, and so does what is summed with what.
inline int64_t chunk_rows(const LinearArgs& a) {
  return std::min(round_up(ceil_div(a.vocab, 64), kBlock), rows_together(a.width));
}

// Running maximum and, relative to it, sum of exponentials and of z times them; a lane per token.
struct Running {
  float max[kPanel], sum[kPanel], weighted[kPanel];
};

// The exponentials of a block of logits, relative to each token's maximum in the block: where they
// are, if they are kept.
template <class Kind>
struct KeptBlock {
  using Kept = typename Kind::Kept;

  KeptBlock(void* block, int64_t lanes)
      : max(static_cast<float*>(block)), e(reinterpret_cast<Kept*>(max + lanes)), lanes(lanes) {}
  KeptBlock from_row(int64_t r) const {
    KeptBlock rest = *this;
    rest.e += r * lanes;
    return rest;
  }
  static int64_t size(int64_t lanes) { return lanes * (sizeof(float) + kBlock * sizeof(Kept)); }

  float* max;     // [lanes], or null
  Kept* e;        // [kBlock, lanes]
  int64_t lanes;  // of tokens
};

// The highest of n logits, times the scale; not -inf, which would make -inf less it NaN.
inline Vec highest_of(const float* z, int n, Vec scale) {
  Vec highest = splat(-kInfinity);
  for (int r = 0; r < n; ++r) {
    highest = at_least(load(z + r * kPanel), highest);
  }
  return at_least(highest * scale, splat(-FLT_MAX));
}

inline Vec below(const float* z, Vec scale, Vec highest) {
  return at_least(fma(load(z), scale, -highest), splat(kLowest));
}

// Sums of a block's exponentials and of z times them, relative to its own maximum: a backward that
// has only this block computes the same bits.
template <class Kind, bool kKeep>
void sum_block(const float* z, int n, Vec scale, Vec highest, const KeptBlock<Kind>& kept, int at,
               Vec& sum, Vec& weighted) {
  for (int r = 0; r < n; ++r) {
    const Vec x = below(z + r * kPanel, scale, highest), e = exp_from_lowest(x);
    sum += e;
    weighted = fma(x, e, weighted);
    if constexpr (kKeep) {
      Kind::keep(e, kept.e + r * kept.lanes + at);
    }
  }
}

// A block's statistics, of kLanes tokens from `at` on, join those before it.
inline void join(Vec highest, Vec sum, Vec weighted, int at, bool first, Running& to) {
  if (!first) {
    const Vec before = load(to.max + at), both = at_least(before, highest);
    const auto relative_to_both = [&](Vec max, Vec& sum, Vec& weighted) {
      const Vec down = at_least(max - both, splat(kLowest)), factor = exp_from_lowest(down);
      weighted = (weighted + down * sum) * factor;
      sum = sum * factor;
    };
    Vec sum_before = load(to.sum + at), weighted_before = load(to.weighted + at);
    relative_to_both(before, sum_before, weighted_before);
    relative_to_both(highest, sum, weighted);
    sum = sum_before + sum;
    weighted = weighted_before + weighted;
    highest = both;
  }
  store(to.max + at, highest);
  store(to.sum + at, sum);
  store(to.weighted + at, weighted);
}

// A block of logits on its way into the statistics, a few rows at a time, beside the next block's
// product.
template <class Kind>
class Folding {
 public:
  // z [n, kPanel] is read until finish().
  void start(const float* z, int n, int vectors, const float* inv_temperature, bool first,
             Running& to, const KeptBlock<Kind>& kept, int64_t steps) {
    z_ = z;
    n_ = n;
    row_ = 0;
    each_ = static_cast<int>((n + steps - 1) / steps);
    vectors_ = vectors;
    first_ = first;
    to_ = &to;
    kept_ = kept;
    for (int j = 0; j < vectors; ++j) {
      scale_[j] = load(inv_temperature + j * kLanes);
      highest_[j] = highest_of(z + j * kLanes, n, scale_[j]);
      sum_[j] = weighted_[j] = Vec{};
      if (kept.max) {
        store(kept.max + j * kLanes, highest_[j]);
      }
    }
  }

  void step() { add(std::min(each_, n_ - row_)); }

  void finish() {
    add(n_ - row_);
    for (int j = 0; n_ > 0 && j < vectors_; ++j) {
      join(highest_[j], sum_[j], weighted_[j], j * kLanes, first_, *to_);
    }
    n_ = row_ = 0;
  }

 private:
  void add(int rows) {
    if (rows == 0) {
      return;
    }
    const float* z = z_ + row_ * kPanel;
    for (int j = 0; j < vectors_; ++j) {
      const int at = j * kLanes;
      Vec sum = sum_[j], weighted = weighted_[j];
      if (kept_.max) {
        const KeptBlock<Kind> kept = kept_.from_row(row_);
        sum_block<Kind, true>(z + at, rows, scale_[j], highest_[j], kept, at, sum, weighted);
      } else {
        sum_block<Kind, false>(z + at, rows, scale_[j], highest_[j], kept_, at, sum, weighted);
      }
      sum_[j] = sum;
      weighted_[j] = weighted;
    }
    row_ += rows;
  }

  const float* z_ = nullptr;
  int n_ = 0, row_ = 0, each_ = 0, vectors_ = 0;
  bool first_ = false;
  Running* to_ = nullptr;
  KeptBlock<Kind> kept_ = {nullptr, 0};
  Vec scale_[kVectors], highest_[kVectors], sum_[kVectors], weighted_[kVectors];
};

// One token's statistics: its maximum and, relative to it, the sums and the sum's logarithm.
struct Merged {
  float max, sum, weighted, log_sum;
};

// Lane i of the `chunks` parts, `stride` apart, in order.
inline Merged merge(const Running* parts, int64_t chunks, int64_t stride, int64_t i) {
  Merged all = {-FLT_MAX, 0.0f, 0.0f, 0.0f};
  for (int64_t c = 0; c < chunks; ++c) {
    all.max = std::max(all.max, parts[c * stride].max[i]);
  }
  for (int64_t c = 0; c < chunks; ++c) {
    const Running& part = parts[c * stride];
    const float down = std::max(part.max[i] - all.max, kLowest), factor = std::exp(down);
    all.sum += part.sum[i] * factor;
    all.weighted += (part.weighted[i] + down * part.sum[i]) * factor;
  }
  all.log_sum = std::log(all.sum);
  return all;
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

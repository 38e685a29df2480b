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

  KeptBlock() = default;  // none
  KeptBlock(void* block, int64_t lanes)
      : max(static_cast<float*>(block)), e(reinterpret_cast<Kept*>(max + lanes)), lanes(lanes) {}
  static int64_t size(int64_t lanes) { return lanes * (sizeof(float) + kBlock * sizeof(Kept)); }

  float* max = nullptr;  // [lanes], or null
  Kept* e = nullptr;     // [kBlock, lanes]
  int64_t lanes = 0;     // of tokens
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

// The sums of a block of logits, of V vectors of tokens, on their way down its rows.
template <class Kind, int V>
struct BlockSums {
  const float* z = nullptr;  // the next row
  KeptBlock<Kind> kept;      // from it on, if anywhere
  int64_t rows = 0;          // left
  Vec scale[V], highest[V], sum[V], weighted[V];

  __attribute__((always_inline)) void step() {
    if (rows == 0) {
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const Vec x = below(z + j * kLanes, scale[j], highest[j]), e = exp_from_lowest(x);
      sum[j] += e;
      weighted[j] = fma(x, e, weighted[j]);
      if (kept.e) {
        Kind::keep(e, kept.e + j * kLanes);
      }
    }
    skip(1);
  }

  void skip(int64_t n) {
    z += n * kPanel;
    kept.e += n * kept.lanes;
    rows -= n;
  }
};

// Blocks of logits on their way into the statistics, a row at a time, beside the next blocks'
// product.
template <class Kind>
class Folding {
 public:
  // z [n, kPanel] is read until finish(); where the exponentials of the block from row r on are
  // kept is kept(r). A product beside has so many steps.
  template <class Kept>
  void start(const float* z, int64_t n, int vectors, const float* inv_temperature, bool first,
             Running& to, Kept kept, int64_t steps) {
    z_ = z;
    n_ = n;
    done_ = taken_ = 0;
    steps_ = steps;
    vectors_ = vectors;
    first_ = first;
    to_ = &to;
    for (int j = 0; j < vectors; ++j) {
      block_.scale[j] = load(inv_temperature + j * kLanes);
    }
    for (int64_t r = 0; r < n; r += kBlock) {
      kept_[r / kBlock] = kept(r);
    }
  }

  BlockSums<Kind, kVectors> begin(int64_t steps) {
    if (idle()) {
      return {};
    }
    taken_ += steps;
    start_block();
    return block_;
  }

  void end(BlockSums<Kind, kVectors> run) {
    if (idle()) {
      return;
    }
    const int64_t late = n_ * taken_ / steps_ - (done_ + block_.rows - run.rows);
    for (int64_t i = 0; i < late; ++i) {
      run.step();
    }
    done_ += block_.rows - run.rows;
    block_ = run;
    finish_block();
  }

  void finish() {
    while (done_ < n_) {
      start_block();
      for (int j = 0; j < vectors_; ++j) {
        const auto run = block_.kept.max ? sum_block<Kind, true> : sum_block<Kind, false>;
        run(block_.z + j * kLanes, static_cast<int>(block_.rows), block_.scale[j],
            block_.highest[j], block_.kept, j * kLanes, block_.sum[j], block_.weighted[j]);
      }
      done_ += block_.rows;
      block_.skip(block_.rows);
      finish_block();
    }
    n_ = done_ = 0;
  }

 private:
  // What is beside a product takes whole panels.
  bool idle() const { return done_ == n_ || vectors_ < kVectors; }

  void start_block() {
    if (block_.rows > 0) {
      return;
    }
    block_.z = z_ + done_ * kPanel;
    block_.rows = std::min<int64_t>(kBlock, n_ - done_);
    block_.kept = kept_[done_ / kBlock];
    for (int j = 0; j < vectors_; ++j) {
      const int rows = static_cast<int>(block_.rows);
      block_.highest[j] = highest_of(block_.z + j * kLanes, rows, block_.scale[j]);
      block_.sum[j] = block_.weighted[j] = Vec{};
      if (block_.kept.max) {
        store(block_.kept.max + j * kLanes, block_.highest[j]);
      }
    }
  }

  void finish_block() {
    const bool first = first_ && done_ <= kBlock;
    for (int j = 0; block_.rows == 0 && j < vectors_; ++j) {
      join(block_.highest[j], block_.sum[j], block_.weighted[j], j * kLanes, first, *to_);
    }
  }

  const float* z_ = nullptr;
  int64_t n_ = 0, done_ = 0;  // rows
  int64_t steps_ = 1, taken_ = 0;
  int vectors_ = 0;
  bool first_ = false;
  Running* to_ = nullptr;
  KeptBlock<Kind> kept_[kMostBlocks];
  BlockSums<Kind, kVectors> block_;
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

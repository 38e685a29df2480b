// The lm-head's logits, a block of vocabulary rows times a panel of tokens at a time, in the
// namespace of the instruction set being compiled.
#pragma once

#include "few.h"
#include "gemm.h"
#include "logprob.h"
#include "pack.h"
#include "pool.h"
#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kTokens = 2048;  // packed at a time, fewer where they take more than
constexpr int64_t kTokenBytes = 8 << 20;
constexpr int64_t kWorthTiling = 8;  // panels that meet a block of the weight
constexpr int64_t kMostBlocks = 8;   // of the weight together

inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = p * square * x + x;
  const Vec far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  return select((x < splat(0.625f)) & (x > splat(-0.625f)), near, far);
}

// Vectors of a panel that hold tokens, as many as the products are made for.
inline int vectors_of(int64_t tokens) {
  const int n = static_cast<int>(ceil_div(tokens, kLanes));
  return n > 2 ? kVectors : n;
}

// The tokens [first, first + count) of a problem, in panels.
class TokenRange {
 public:
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  int64_t panels() const { return ceil_div(count_, kPanel); }
  int64_t in_panel(int64_t p) const { return std::min<int64_t>(kPanel, count_ - p * kPanel); }
  int vectors(int64_t p) const { return vectors_of(in_panel(p)); }

 protected:
  void take(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
  }

 private:
  int64_t first_ = 0, count_ = 0;
};

// Logits of a block, z[kBlock, kPanel], before the temperature, from what the products left there.
inline void to_logits(const LinearArgs& a, int64_t v0, int64_t n, int vectors, float* z) {
  if (!a.bias && a.logit_scale == 1.0f && a.softcap <= 0.0f) {
    return;
  }
  for (int64_t r = 0; r < n; ++r) {
    const float bias = a.bias ? a.bias[v0 + r] : 0.0f;
    for (int j = 0; j < vectors; ++j) {
      float* at = z + r * kPanel + j * kLanes;
      Vec x = (load(at) + bias) * a.logit_scale;
      if (a.softcap > 0.0f) {
        x = a.softcap * tanh(x / a.softcap);
      }
      store(at, x);
    }
  }
}

// Packed for products with rows of the weight.
template <class Kind>
class Tokens : public TokenRange {
 public:
  using Element = typename Kind::Element;

  Tokens(const LinearArgs& a, int64_t capacity)
      : a_(a),
        steps_(ceil_div(a.width, Kind::kStep)),
        packed_(round_up(capacity, kPanel) * steps_) {}

  void pack(int64_t first, int64_t count, int threads) {
    take(first, count);
    parallel_for(panels(), threads, [&](int64_t p) { pack_panel(p); });
  }

  // Of a packed panel.
  int64_t columns(int64_t p) const {
    if (Kind::kStep > 1 || (panels() > 1 && vectors(p) > 1)) {
      return kPanel;
    }
    return vectors(p) == 1 ? columns_of_few(in_panel(p), type()) : vectors(p) * kLanes;
  }

  // Of the weight's rows as the products get them.
  Float type() const { return Kind::kStep == 1 && panels() > 1 ? Float::f32 : a_.weight_type; }

  // Of depth, at which logits take a step beside; at least one.
  int64_t steps(int64_t rows) const { return tile_steps(rows, steps_); }

  // Of a block of the weight's rows.
  int64_t scratch() const { return kBlock * round_up(a_.width, 32); }

  // Blocks of the weight's rows that stay in L2 while panel after panel meets them: a product of
  // pairs is done with a block sooner than L3 has brought the next panel.
  int64_t blocks_together() const {
    constexpr int64_t kBytes = 3 << 18;
    const int64_t fit = kBytes / (kBlock * a_.width * bytes(a_.weight_type));
    return Kind::kStep == 1 || panels() == 1 ? 1 : std::clamp<int64_t>(fit, 1, kMostBlocks);
  }

  // Rows [v0, v0 + n) of the weight; in `scratch` [kBlock, H], as floats if they are not stored so
  // and more than one panel wants them, or in tiles if many do.
  Rows weight_rows(int64_t v0, int n, float* scratch) const {
    const auto* weight = static_cast<const char*>(a_.weight);
    const bool convert = type() != a_.weight_type;
    const int64_t stride = a_.weight_stride * bytes(a_.weight_type);
    if (Made<Kind>::kTiles && panels() >= kWorthTiling) {
      return in_tiles(weight + v0 * stride, stride, n, reinterpret_cast<Element*>(scratch));
    }
    Rows rows;
    rows.data = convert ? reinterpret_cast<const char*>(scratch) : weight;
    rows.stride = sizeof(Element);
    for (int r = 0; r < kBlock; ++r) {
      const int64_t row = std::min(r, n - 1);  // rows that are not there: computed, never used
      if (convert && r < n) {
        to_floats(weight + (v0 + r) * stride, a_.weight_type, a_.width, scratch + r * a_.width);
      }
      rows.row[r] = convert ? row * a_.width * 4 : (v0 + row) * stride;
    }
    return rows;
  }

  // Logits before the temperature, z[n, kPanel], of blocks of rows one behind the other. Steps of
  // `aside` are taken on the way, if the product leaves time for them.
  template <class Aside>
  void logits(const Rows* blocks, int64_t v0, int64_t n, int64_t p, float* z, Aside& aside) const {
    const int vectors = this->vectors(p);
    bool done = false;
    if constexpr (Made<Kind>::kTiles) {
      if (panels() > 1) {
        multiply_beside(Kind(), blocks, n, steps_, panel(p), vectors, z, aside);
        done = true;
      }
    }
    for (int64_t r = 0; !done && r < n; r += kBlock) {
      const int of_block = static_cast<int>(std::min<int64_t>(kBlock, n - r));
      multiply_block(blocks[r / kBlock], of_block, p, z + r * kPanel);
    }
    to_logits(a_, v0, n, vectors, z);
  }

  void logits(const Rows* blocks, int64_t v0, int64_t n, int64_t p, float* z) const {
    Nothing nothing;
    logits(blocks, v0, n, p, z, nothing);
  }

 private:
  const Element* panel(int64_t p) const { return packed_.get() + p * kPanel * steps_; }

  void multiply_block(const Rows& rows, int n, int64_t p, float* z) const {
    const int vectors = this->vectors(p);
    const EvenRows even{rows.data + rows.row[0], rows.row[1] - rows.row[0]};
    const bool one = panels() == 1 && (Kind::kStep == 1 || Made<Kind>::kTiles);
    if (Kind::kStep == 1 && vectors == 1) {  // few tokens: reading the weight is what takes time
      if constexpr (Kind::kStep == 1) {
        multiply_few(even, type(), n, steps_, {panel(p), columns(p), 1, in_panel(p)}, z);
      }
    } else if (one || vectors == 1) {
      multiply_streamed<Kind>(even, type(), n, steps_, {panel(p), columns(p), vectors}, z);
    } else {
      multiply<Kind>(rows, n, steps_, panel(p), vectors, z);
    }
  }

  // 16-bit rows, `stride` bytes apart.
  Rows in_tiles(const char* from, int64_t stride, int n, Element* to) const {
    const Made<Kind> made{round_up(steps_, 16)};
    for (int r = 0; r < n; ++r) {
      copy_to_tiles(made, r, from + r * stride, steps_, to);
    }
    return made.rows(to, 0, n);
  }

  void pack_panel(int64_t p) {
    Element* const panel = packed_.get() + p * kPanel * steps_;
    const int64_t columns = this->columns(p), padded = round_up(steps_, kLanes);
    Buffer<Element> rows(columns * padded);
    for (int64_t i = 0; i < columns; ++i) {
      Element* const elements = rows.get() + i * padded;
      if (i < in_panel(p)) {
        const int64_t at = a_.row(first() + p * kPanel + i) * a_.width * bytes(a_.hidden_type);
        const char* from = static_cast<const char*>(a_.hidden) + at;
        if constexpr (Kind::kStep == 1) {
          to_floats(from, a_.hidden_type, a_.width, elements);
        } else {
          std::memcpy(elements, from, steps_ * sizeof(Element));
        }
      } else {
        std::memset(elements, 0, steps_ * sizeof(Element));
      }
    }
    if (columns % kLanes == 0) {
      return transpose_words(rows.get(), padded, columns, steps_, panel, columns);
    }
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t k = 0; k < steps_; ++k) {
        panel[k * columns + i] = rows[i * padded + k];
      }
    }
  }

  const LinearArgs& a_;
  const int64_t steps_;
  Buffer<Element> packed_;
};

template <class Kind>
int64_t most_at_once(const LinearArgs& a) {
  const int64_t bytes = round_up(a.width, Kind::kStep) * 4 / Kind::kStep;
  return std::clamp<int64_t>(kTokenBytes / bytes / kPanel * kPanel, kPanel, kTokens);
}

// Of rounds of one length, for each of which the whole weight passes.
template <class Kind>
int64_t tokens_of_round(const LinearArgs& a) {
  const int64_t rounds = ceil_div(a.rows, most_at_once<Kind>(a));
  return rounds > 1 ? round_up(ceil_div(a.rows, rounds), kPanel) : a.rows;
}

// All of two rounds' of pairs: better than another pass.
template <class Kind>
int64_t tokens_at_once(const LinearArgs& a) {
  return a.rows <= Kind::kStep * most_at_once<Kind>(a) ? a.rows : tokens_of_round<Kind>(a);
}

// As many as have enough to multiply: two million products take some tens of microseconds, as does
// waking a thread, and on a busy machine it is a time slice until that thread runs.
inline int worth_waking(const LinearArgs& a, int threads) {
  const int64_t worth = a.rows * a.width * a.vocab >> 21;
  return static_cast<int>(std::clamp<int64_t>(worth, 1, threads));
}

// Pairs need both operands in bf16, and rows that end on a pair.
[[maybe_unused]] inline bool use_pairs(const LinearArgs& a) {
  return a.hidden_type == Float::bf16 && a.weight_type == Float::bf16 && a.width % 2 == 0;
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

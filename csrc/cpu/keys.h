// Keys and values of attention as operands of products, and one thread's scratch, in the namespace
// of the instruction set being compiled.
#pragma once

#include "queries.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Element (token, head, 0) of a tensor.
inline const char* row_of(const Heads& x, Float type, int64_t token, int64_t head) {
  return static_cast<const char*>(x.data) +
         (token * x.token_stride + head * x.head_stride) * bytes(type);
}

// What rounding x to a 16-bit type took from it, in 1 / 256 of a step of that type. The gradient of
// a score is a difference that cancels where one key has all the weight; with the rounded output
// alone, what is left there would be the rounding.
inline int rest_shift(Float type) { return type == Float::bf16 ? 8 : 5; }

inline void keep_rest(const float* x, const float* rounded, Float type, int64_t n, int8_t* rest) {
  const int shift = rest_shift(type);
  for (int64_t i = 0; i < n; ++i) {
    int32_t exact, bits;
    std::memcpy(&exact, x + i, sizeof exact);
    std::memcpy(&bits, rounded + i, sizeof bits);
    const int32_t steps = (exact - bits + (1 << (shift - 1))) >> shift;
    rest[i] = static_cast<int8_t>(std::clamp(steps, -128, 127));
  }
}

inline void add_rest(float* rounded, Float type, int64_t n, const int8_t* rest) {
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, rounded + i, sizeof bits);
    bits += rest[i] * (1 << rest_shift(type));
    std::memcpy(rounded + i, &bits, sizeof bits);
  }
}

// Keys or values of one block: X [n, D].
template <class Kind>
class Keys {
 public:
  using Element = typename Kind::Element;

  Keys(const AttentionArgs& a, const Heads& x)
      : a_(a),
        x_(x),
        convert_(Kind::kStep == 1 && a.type != Float::f32),
        floats_(convert_ ? kKeys * a.width : 0),
        packed_(kSteps * round_up(a.width, kPanel)),
        transposed_(kSteps * a.width) {}

  void take(int64_t head, int64_t first, int64_t n) {
    from_ = row_of(x_, a_.type, first, head);
    n_ = n;
    for (int64_t b = 0; b < n; b += kBlock) {
      Rows& rows = rows_[b / kBlock];
      rows.data = convert_ ? reinterpret_cast<const char*>(floats_.get()) : from_;
      rows.stride = sizeof(Element);
      for (int64_t r = 0; r < kBlock; ++r) {
        const int64_t key = std::min(b + r, n - 1);  // beyond: computed, never used
        rows.row[r] = convert_ ? key * a_.width * 4 : key * x_.token_stride * bytes(a_.type);
      }
    }
    for (int64_t key = 0; convert_ && key < n; ++key) {
      to_floats(from_ + key * x_.token_stride * bytes(a_.type), a_.type, a_.width,
                floats_.get() + key * a_.width);
    }
  }

  // Makes X^T, for add_transposed.
  void transpose() {
    pack_rows(Kind(), from_, x_.token_stride, a_.type, 0, n_, a_.width, kKeys, packed_.get());
    for (int64_t d = 0; d < a_.width; d += kPanel) {
      transpose_words(packed_.get() + d * kSteps, kPanel, ceil_div(n_, Kind::kStep),
                      std::min<int64_t>(kPanel, a_.width - d), transposed_.get() + d * kSteps,
                      kSteps);
    }
  }

  // z[n x kPanel] = X * panel for the first n keys
  void multiply(int64_t n, const Element* panel, int vectors, float* z) const {
    for (int64_t b = 0; b < n; b += kBlock) {
      FASTRL_ISA::multiply<Kind>(rows_[b / kBlock],
                                 static_cast<int>(std::min<int64_t>(kBlock, n - b)),
                                 a_.width / Kind::kStep, panel, vectors, z + b * kPanel);
    }
  }

  // sums[D x kPanel] = factor * sums + X^T * panel over the first n keys, the product only for
  // columns that see some of these keys: what others would add is 0, or NaN where this segment
  // holds one.
  void add_transposed(int64_t n, const Element* panel, int vectors, const IVec* sees,
                      const float* factor, float* c, float* sums) const {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(transposed_.get());
    rows.stride = sizeof(Element);
    for (int64_t d = 0; d < a_.width; d += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, a_.width - d));
      for (int r = 0; r < kBlock; ++r) {
        rows.row[r] = (d + std::min(r, count - 1)) * kSteps * sizeof(Element);
      }
      FASTRL_ISA::multiply<Kind>(rows, count, ceil_div(n, Kind::kStep), panel, vectors, c);
      for (int j = 0; j < vectors; ++j) {
        const Vec scale = load(factor + j * kLanes);
        for (int r = 0; r < count; ++r) {
          const Vec more = load(c + r * kPanel + j * kLanes);
          float* to = sums + (d + r) * kPanel + j * kLanes;
          store(to, fma(load(to), scale, sees ? select(sees[j], more, Vec{}) : more));
        }
      }
    }
  }

 private:
  static constexpr int64_t kSteps = kKeys / Kind::kStep;

  const AttentionArgs& a_;
  const Heads& x_;
  const bool convert_;
  const char* from_ = nullptr;
  int64_t n_ = 0;
  Rows rows_[kKeys / kBlock];
  Buffer<float> floats_;
  Buffer<Element> packed_, transposed_;
};

// What forward and backward share: one worker's view of a chunk.
template <class Kind>
class Worker {
 public:
  using Element = typename Kind::Element;

  explicit Worker(const AttentionArgs& a)
      : a_(a),
        steps_(a.width / Kind::kStep),
        padded_(round_up(steps_, kLanes)),
        keys_(a, a.k),
        values_(a, a.v),
        columns_(kColumns * padded_),
        rows_(kPanel * round_up(a.width, kLanes)),
        z_(kKeys * kPanel),
        c_(kBlock * kPanel),
        sums_(kPanels * kPanel * round_up(a.width, kLanes)) {}

 protected:
  float* sums(int64_t panel) const {
    return sums_.get() + panel * kPanel * round_up(a_.width, kLanes);
  }

  // Rows of x at the columns, side by side; 0 where there is no column.
  void gather(const Queries& queries, const Heads& x) const {
    for (int64_t i = 0; i < queries.panels() * kPanel; ++i) {
      Element* to = columns_.get() + i * padded_;
      if (i >= queries.count()) {
        std::memset(to, 0, steps_ * sizeof(Element));
        continue;
      }
      const char* from = row_of(x, a_.type, queries.token(i), queries.head(i));
      if constexpr (Kind::kStep == 1) {
        to_floats(from, a_.type, a_.width, to);
      } else {
        std::memcpy(to, from, steps_ * sizeof(Element));
      }
    }
  }

  // What was gathered as B with depth D: [panel][D / kStep][kPanel].
  void pack_depth(const Queries& queries, Element* to) const {
    for (int64_t p = 0; p < queries.panels(); ++p) {
      transpose_words(columns_.get() + p * kPanel * padded_, padded_, kPanel, steps_,
                      to + p * kPanel * steps_, kPanel);
    }
  }

  // The panel's sums times factor to its columns of a contiguous [T, Hq, D].
  void write(const Queries& queries, int64_t p, const float* factor, void* to,
             int8_t* rest = nullptr) const {
    const int64_t padded = round_up(a_.width, kLanes);
    float* from = sums(p);
    for (int64_t d = 0; d < a_.width; ++d) {
      for (int j = 0; j < kPanel; j += kLanes) {
        store(from + d * kPanel + j, load(from + d * kPanel + j) * load(factor + j));
      }
    }
    transpose_words(from, kPanel, padded, kPanel, rows_.get(), padded);
    for (int64_t i = p * kPanel; i < std::min<int64_t>((p + 1) * kPanel, queries.count()); ++i) {
      const int64_t at = (queries.token(i) * a_.heads + queries.head(i)) * a_.width;
      float* row = rows_.get() + (i - p * kPanel) * padded;
      char* rounded = static_cast<char*>(to) + at * bytes(a_.type);
      from_floats(row, a_.type, a_.width, rounded);
      if (rest) {
        to_floats(rounded, a_.type, a_.width, from);
        keep_rest(row, from, a_.type, a_.width, rest + at);
      }
    }
  }

  static bool masked(const Seen& seen, int64_t first, int64_t n) {
    return first < seen.all_first || first + n > seen.all_last;
  }

  // Where columns see some of the keys [first, first + n).
  static void sees_some(const Seen& seen, int64_t first, int64_t n, IVec* sees) {
    const IVec begin = IVec{} + static_cast<int32_t>(first);
    for (int j = 0; j < kVectors; ++j) {
      const int at = j * kLanes;
      sees[j] =
          (load(seen.from + at) < begin + static_cast<int32_t>(n)) & (load(seen.to + at) > begin);
    }
  }

  const AttentionArgs& a_;
  const int64_t steps_, padded_;
  Keys<Kind> keys_, values_;
  Buffer<Element> columns_;
  Buffer<float> rows_, z_, c_, sums_;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

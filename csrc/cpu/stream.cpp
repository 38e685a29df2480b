// See stream.h.
#include "stream.h"

#include "convert.h"
#include "quant_gemm.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Sums of two slices of depth, which may be integers, whose bits Vec then holds.
template <class Kind>
inline Vec add(Kind, Vec a, Vec b) {
  return a + b;
}

// Bytes of a step of depth where rows of A are stored; they are widened if those are not kBytes.
template <class Kind>
inline int64_t stored_bytes(Kind, Float type) {
  return Kind::kBytes == 4 * Kind::kStep ? bytes(type) * Kind::kStep : Kind::kBytes;
}

template <class Kind>
inline void widen(Kind, const char* from, Float type, int64_t steps, char* to) {
  to_floats(from, type, steps * Kind::kStep, reinterpret_cast<float*>(to));
}

#ifndef FASTRL_TILES
// kDepth neighbours in depth as 32 bits, whose products are summed in int32.
struct Words {
  using Element = uint32_t;
  static constexpr int kStep = kDepth, kBytes = 4;
  static constexpr int64_t kSteps = 256;
  static inline Vec multiply_add(const uint32_t* a, Vec b, Vec c) {
    int32_t word;
    std::memcpy(&word, a, sizeof word);
    return as_float(fastrl::FASTRL_ISA::multiply_add(as_int(c), word, as_int(b)));
  }
};

inline Vec add(Words, Vec a, Vec b) { return as_float(as_int(a) + as_int(b)); }

inline int64_t stored_bytes(Words, Float) { return kDepth; }

inline void widen(Words, const char* from, Float, int64_t steps, char* to) {
  for (int64_t i = 0; i < steps * kDepth; ++i) {
    const int16_t wide = static_cast<int8_t>(from[i]);
    std::memcpy(to + i * 2, &wide, sizeof wide);
  }
}

#endif

// multiply_tile, which see. As many rows from `ahead` on are asked for, a cache line of each at a
// time. Where kStride is not 0, rows lie so far apart: all are reached from one address, and a
// multiplication reads what it broadcasts.
template <class Kind, int R, int V, int kStride>
__attribute__((noinline)) void stream_tile(const char* a, int64_t stride, const char* ahead,
                                           int64_t steps, const typename Kind::Element* panel,
                                           int64_t columns, float* c, bool first) {
  using Element = typename Kind::Element;
  constexpr int kLine = 64 / Kind::kBytes;
  constexpr int kThrees = (R + 2) / 3;  // a register for three rows
  const float* b = reinterpret_cast<const float*>(panel);
  const char *rows[kThrees], *next[kThrees];
#pragma GCC unroll 4
  for (int i = 0; i < kThrees; ++i) {
    rows[i] = a + 3 * i * stride;
    next[i] = ahead + 3 * i * stride;
  }
  Vec sum[R][V];  // in registers, as long as every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      sum[r][j] = splat(0.0f);
    }
  }
  const auto step = [&](int64_t at) {
    Vec x[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      x[j] = load(b + j * kLanes);
    }
    b += columns;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const char* row = kStride ? a + at + r * kStride : rows[r / 3] + r % 3 * stride + at;
      const auto* element = reinterpret_cast<const Element*>(row);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        sum[r][j] = Kind::multiply_add(element, x[j], sum[r][j]);
      }
    }
  };
  int64_t at = 0;
  for (; at + 64 <= steps * Kind::kBytes; at += 64) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next[r / 3] + r % 3 * stride + at, 0, 2);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kLine; ++k) {
      step(at + k * Kind::kBytes);
    }
  }
  for (; at < steps * Kind::kBytes; at += Kind::kBytes) {
    step(at);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      float* to = c + r * kPanel + j * kLanes;
      store(to, first ? sum[r][j] : add(Kind(), load(to), sum[r][j]));
    }
  }
}

// A block of rows of `type` times a panel of V vectors.
template <class Kind, int V>
class StreamedBlock {
 public:
  StreamedBlock(const EvenRows& a, Float type, int rows, int64_t steps,
                const PanelView<typename Kind::Element>& panel, float* c)
      : a_(a), type_(type), rows_(rows), steps_(steps), panel_(panel), c_(c) {}

  void run() {
    for (k_ = 0; k_ < steps_; k_ += Kind::kSteps) {  // a slice of the panel stays in L1
      tiles<kTile>(0);
    }
  }

 private:
  static constexpr int kTile = std::min(kMostRows, kSums / V);  // as registers allow
  static constexpr int kNear = Kind::kSteps * Kind::kBytes;     // bytes of a row in near_

  // Tiles of R rows as long as there are so many, then smaller ones.
  template <int R>
  void tiles(int r) {
    const int64_t count = std::min(Kind::kSteps, steps_ - k_);
    const int64_t size = stored_bytes(Kind(), type_);
    for (; r + R <= rows_; r += R) {
      // Next come the rows below, or the next slice, or the next block.
      const int64_t row = r + R < rows_ ? r + R : k_ + count < steps_ ? 0 : rows_;
      const int64_t k = r + R < rows_ ? k_ : k_ + count < steps_ ? k_ + count : 0;
      const char* rows = a_.data + r * a_.stride + k_ * size;
      const char* next = a_.data + row * a_.stride + k * size;
      const bool near = size != Kind::kBytes;
      for (int i = 0; near && i < R; ++i) {
        widen(Kind(), rows + i * a_.stride, type_, count, near_ + i * kNear);
      }
      const auto run = near ? stream_tile<Kind, R, V, kNear> : stream_tile<Kind, R, V, 0>;
      run(near ? near_ : rows, a_.stride, next, count, panel_.data + k_ * panel_.columns,
          panel_.columns, c_ + r * kPanel, k_ == 0);
    }
    if constexpr (R > 1) {
      tiles<(R > 4 ? 4 : R / 2)>(r);
    }
  }

  const EvenRows a_;
  const Float type_;
  const int rows_;
  const int64_t steps_;
  const PanelView<typename Kind::Element> panel_;
  float* const c_;
  int64_t k_ = 0;
  alignas(64) char near_[kTile * kNear];  // rows, widened
};

template <class Kind>
void stream(const EvenRows& a, Float type, int rows, int64_t steps,
            const PanelView<typename Kind::Element>& panel, float* c) {
  bool whole = std::is_same_v<Kind, Floats> && type == Float::f32 && panel.vectors > 2 &&
               rows % kMostRows == 0;  // enough to multiply, and more panels may follow
#ifdef FASTRL_TILES
  if constexpr (std::is_same_v<Kind, Pairs>) {  // tiles sum otherwise
    return stream_tiles<Kind>(a, rows, steps, panel, c);
  }
#endif
  if (whole) {
    Rows all;
    all.data = a.data;
    all.stride = Kind::kBytes;
    for (int r = 0; r < kBlock; ++r) {
      all.row[r] = std::min(r, rows - 1) * a.stride;
    }
    return multiply<Kind>(all, rows, steps, panel.data, panel.vectors, c);
  }
  if (panel.vectors == 1) {
    StreamedBlock<Kind, 1>(a, type, rows, steps, panel, c).run();
  } else if (panel.vectors == 2) {
    StreamedBlock<Kind, 2>(a, type, rows, steps, panel, c).run();
  } else if (kVectors > 3 && panel.vectors == 3) {
    StreamedBlock<Kind, std::min(3, kVectors)>(a, type, rows, steps, panel, c).run();
  } else {
    StreamedBlock<Kind, kVectors>(a, type, rows, steps, panel, c).run();
  }
}

}  // namespace

void stream_floats(const EvenRows& a, Float type, int rows, int64_t steps,
                   const PanelView<float>& panel, float* c) {
  stream<Floats>(a, type, rows, steps, panel, c);
}
#ifdef FASTRL_PAIRS
void stream_pairs(const EvenRows& a, Float type, int rows, int64_t steps,
                  const PanelView<uint32_t>& panel, float* c) {
  stream<Pairs>(a, type, rows, steps, panel, c);
}
void stream_unpaired_floats(const EvenRows& a, Float type, int rows, int64_t steps,
                            const PanelView<uint32_t>& panel, float* c) {
  stream<UnpairedFloats>(a, type, rows, steps, panel, c);
}
#endif
void stream_words(const EvenRows& a, int rows, int64_t steps, const PanelView<uint32_t>& panel,
                  float* c) {
#ifdef FASTRL_TILES
  stream_tiles<Fours>(a, rows, steps, panel, reinterpret_cast<int32_t*>(c));
#else
  stream<Words>(a, Float::f32, rows, steps, panel, c);
#endif
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

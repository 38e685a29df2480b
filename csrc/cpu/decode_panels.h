// Activations of many rows as panels, [panel][feature][kPanel] with a row per lane, and what is
// done to them: products with weights, norms, activations. Nothing crosses lanes, so a row's bits
// do not depend on the rows beside it, and what leaves a product is in place for the next one.
#pragma once

#include <cmath>
#include <list>

#include "decode.h"
#include "linear.h"
#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kWorthWaking = 64 << 10;  // numbers to look at, for another thread to help

// n of an arena, until it is reset; nobody has written them.
template <class T>
class Borrowed {
 public:
  Borrowed(Arena& arena, int64_t n) : data_(static_cast<T*>(arena.take(n * sizeof(T)))) {}
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// How M rows lie in panels.
struct Lanes {
  int64_t rows;

  int64_t panels() const { return ceil_div(rows, kPanel); }
  // Vectors of the panel that hold rows.
  int vectors(int64_t p) const {
    return static_cast<int>(ceil_div(std::min<int64_t>(kPanel, rows - p * kPanel), kLanes));
  }
  // All vectors of all panels.
  int64_t count() const { return ceil_div(rows, kLanes); }
  bool full() const { return count() == panels() * kVectors; }
  // Where vector v begins in panels of `features`.
  static int64_t at(int64_t v, int64_t features) {
    return v / kVectors * features * kPanel + v % kVectors * kLanes;
  }
};

// Features k and k + 1 of a vector of rows, into a panel that a product reads.
inline void put(Floats, float* panel, int64_t columns, int64_t k, Vec even, Vec odd) {
  store(panel + k * columns, even);
  store(panel + (k + 1) * columns, odd);
}
#ifdef FASTRL_PAIRS
inline void put(Pairs, uint32_t* panel, int64_t columns, int64_t k, Vec even, Vec odd) {
  uint16_t low[kLanes], high[kLanes];
  Pairs::keep(even, low);
  Pairs::keep(odd, high);
  const Vec pairs = Pairs::pairs(low, high);
  std::memcpy(panel + k / 2 * columns, &pairs, sizeof pairs);
}
#endif

// task(r, at) for the vectors of a block of n rows: of its row r, and where they are in it.
template <class Task>
void each_vector(int n, int vectors, const Task& task) {
  for (int r = 0; r < n; ++r) {
    for (int j = 0; j < vectors; ++j) {
      task(r, r * kPanel + j * kLanes);
    }
  }
}

// [panel][depth / kStep][columns] Elements, the right-hand side of products.
template <class Kind>
class Operand {
 public:
  using Element = typename Kind::Element;
  using Panel = PanelView<Element>;

  Operand(Arena& arena, const Lanes& lanes, int64_t most)
      : lanes_(lanes), data_(arena, lanes.panels() * most / Kind::kStep * kPanel) {
    if (!lanes.full()) {  // lanes without a row are multiplied too: let them hold numbers
      std::memset(data_.get(), 0, lanes.panels() * most / Kind::kStep * kPanel * 4);
    }
  }

  // The last panel has as many as it needs, but tiles are cut from whole ones.
  int64_t columns(int64_t p) const {
#ifdef FASTRL_TILES
    if (std::is_same_v<Kind, Pairs>) {
      return kPanel;
    }
#endif
    return lanes_.vectors(p) * kLanes;
  }
  Panel panel(int64_t p, int64_t depth) const {
    return {start(p, depth), columns(p), lanes_.vectors(p), lanes_.rows - p * kPanel};
  }
  // What products of Kind::OfFloats read, blocks of any size.
  Panel unrounded(int64_t p, int64_t depth) const {
    return {start(p, depth), columns(p), lanes_.vectors(p)};
  }

  // put(k, even, odd), which keeps features k and k + 1 of vector v.
  auto vector(int64_t v, int64_t depth) const {
    const int64_t p = v / kVectors, columns = this->columns(p);
    Element* const to = start(p, depth) + v % kVectors * kLanes;
    return [=](int64_t k, Vec even, Vec odd) { put(Kind(), to, columns, k, even, odd); };
  }

  // All features of all rows are there.
  void complete(int64_t, int) const {}

 private:
  Element* start(int64_t p, int64_t depth) const {
    return data_.get() + p * (depth / Kind::kStep) * kPanel;
  }

  const Lanes lanes_;
  Borrowed<Element> data_;
};

// A vector of parameters as floats.
class Parameters {
 public:
  Parameters(const void* from, Float type, int64_t n)
      : copy_(from && type != Float::f32 ? n : 0),
        data_(type == Float::f32 ? static_cast<const float*>(from) : copy_.get()) {
    if (copy_.get()) {
      to_floats(from, type, n, copy_.get());
    }
  }
  explicit operator bool() const { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  Buffer<float> copy_;
  const float* data_;
};

// A vector of parameters or nothing, added to blocks of as many rows.
class Bias {
 public:
  explicit Bias(const DecodeMatrix& w) : bias_(w.bias, w.type, w.rows) {}

  void add(int64_t r0, int n, int vectors, float* z) const {
    if (bias_) {
      each_vector(n, vectors, [&](int r, int at) { store(z + at, load(z + at) + bias_[r0 + r]); });
    }
  }

 private:
  const Parameters bias_;
};

// Blocks of rows that are taken together where they are copied.
#ifdef FASTRL_TILES
constexpr int kBlocksTogether = 4;
#else
constexpr int kBlocksTogether = 1;
#endif
constexpr int kRowsTogether = kBlocksTogether * kBlock;

// A block of rows of a matrix times a panel, z[kBlock, kPanel], of which no more is written than
// there are rows where the panel does not say how many tokens it has. With tiles, where many panels
// follow, several blocks, whose rows are copied tile by tile.
template <class Kind>
class BlockProduct {
 public:
  static constexpr bool kTiles = Made<Kind>::kTiles && Kind::kBytes == 4;

  explicit BlockProduct(const DecodeMatrix& w) : w_(w), bias_(w) {}

  void take(int64_t r0, int n, [[maybe_unused]] char* copy = nullptr) {
    r0_ = r0;
    n_ = n;
    if constexpr (kTiles) {
      copied_ = copy;
      for (int r = 0; copied_ && r < n; r += kBlock) {
        copy_block(r, std::min(kBlock, n - r), reinterpret_cast<typename Kind::Element*>(copy));
      }
    }
  }

  // Whether no more is written than the rows taken, and sums can go on in z: for all blocks of a
  // matrix or none, so that a row's bits do not depend on how threads share them.
  bool exact() const { return kTiles && w_.rows % 16 == 0; }

  // z = the product, or, where that is exact, `onto` what z has.
  void with(const PanelView<typename Kind::Element>& panel, float* z,
            [[maybe_unused]] bool onto = false) const {
    const int64_t stride = w_.stride * bytes(w_.type);
    const EvenRows rows = {static_cast<const char*>(w_.weight) + r0_ * stride, stride};
#ifdef FASTRL_TILES
    if constexpr (kTiles) {
      const int64_t steps = w_.depth / Kind::kStep;
      if (copied_) {
        multiply_blocks<Kind>(blocks_, n_, steps, panel.data, panel.vectors, z, onto);
      } else {
        stream_tiles<Kind>(rows, n_, steps, panel, z, onto);
      }
      return bias_.add(r0_, n_, panel.vectors, z);
    }
#endif
    if constexpr (std::is_same_v<Kind, Floats>) {
      if (panel.vectors == 1) {
        multiply_few(rows, w_.type, n_, w_.depth, panel, z);
        return bias_.add(r0_, n_, panel.vectors, z);
      }
    }
    multiply_streamed<Kind>(rows, w_.type, n_, w_.depth / Kind::kStep, panel, z);
    bias_.add(r0_, n_, panel.vectors, z);
  }

 private:
  void copy_block(int r0, int n, typename Kind::Element* to) {
    const int64_t stride = w_.stride * bytes(w_.type), steps = w_.depth / Kind::kStep;
    const Made<Kind> made{round_up(steps, 16)};
    const char* from = static_cast<const char*>(w_.weight) + (r0_ + r0) * stride;
    for (int r = 0; r < n; ++r) {
      copy_to_tiles(made, r0 + r, from + r * stride, steps, to);
    }
    blocks_[r0 / kBlock] = made.rows(to, r0, n);
  }

  const DecodeMatrix& w_;
  const Bias bias_;
  int64_t r0_ = 0;
  int n_ = 0;
  bool copied_ = false;
  Rows blocks_[kTiles ? kBlocksTogether : 1];
};

// The same of a linear with its adapters; `low` is what these reduced the panels to.
template <class Kind>
class LinearProduct {
 public:
  LinearProduct(const DecodeLinear& w, const float* low) : low_(low), rank_(w.rank()), base_(w) {
    for (const LowRank& adapter : w.adapters) {
      addends_.emplace_back(adapter);
    }
  }

  void take(int64_t r0, int n, char* copy) {
    r0_ = r0;
    n_ = n;
    base_.take(r0, n, copy);
  }

  bool exact() const { return base_.exact(); }

  void with(const typename Operand<Kind>::Panel& panel, int64_t p, float* z, bool onto = false) {
    base_.with(panel, z, onto);
    const float* low = low_ + p * rank_ * kPanel;
    for (Addend& addend : addends_) {
      for (int r = 0; r < n_; r += kBlock) {
        add(addend, low, panel.vectors, r, z + r * kPanel);
      }
      low += addend.adapter.a.rows * kPanel;
    }
  }

 private:
  struct Addend {
    explicit Addend(const LowRank& adapter) : adapter(adapter), product(adapter.b) {}
    const LowRank& adapter;
    BlockProduct<Floats> product;
  };

  // To the block of rows from the r-th on.
  void add(Addend& addend, const float* low, int vectors, int r, float* z) const {
    alignas(64) float y[kBlock * kPanel];
    const int n = std::min(kBlock, n_ - r);
    addend.product.take(r0_ + r, n);
    addend.product.with({low, kPanel, vectors}, y);
    const float scaling = addend.adapter.scaling;
    each_vector(n, vectors,
                [&](int, int at) { store(z + at, load(z + at) + load(y + at) * scaling); });
  }

  const float* low_;  // [panel][rank][kPanel], one adapter after the other
  const int64_t rank_;
  BlockProduct<Kind> base_;
  std::list<Addend> addends_;
  int64_t r0_ = 0;
  int n_ = 0;
};

// Rows that products take at a time, and tasks that a thread gets of them.
#ifdef FASTRL_TILES
constexpr int64_t kWholeTiles = 32, kTasks = 8;
#else
constexpr int64_t kWholeTiles = kBlock, kTasks = 4;
#endif

// Runs over blocks of `rows` rows of a weight and panels: task(first row, rows, first panel,
// panels) gets a few of each. Which ones a task takes changes who computes, not what.
struct BlockTasks {
  // Rows have so many bytes where BlockProduct can copy them, or 0.
  BlockTasks(const Lanes& lanes, int64_t rows, int64_t bytes, int threads)
      : rows(rows), panels(lanes.panels()) {
    per_range = round_up(ceil_div(rows, kTasks * threads), kWholeTiles);
    if (bytes > 0 && panels >= kWorthTiling) {
      constexpr int64_t kBytes = 3 << 18;  // that stay in L2 while the panels pass
      block = std::clamp<int64_t>(kBytes / bytes / kBlock, 1, kBlocksTogether) * kBlock;
      const int64_t share = round_up(ceil_div(rows, 2 * threads), kWholeTiles);
      per_range = std::max(per_range, std::min<int64_t>(kBlock, share));
      copy = block * round_up(bytes, 64);
    }
    ranges = ceil_div(rows, per_range);
    groups = std::min(panels, ceil_div(4 * threads, ranges));
    per_group = ceil_div(panels, groups);
  }
  int64_t count() const { return ranges * groups; }

  template <class Take, class With>
  void run(int64_t task, const Take& take, const With& with) const {
    const int64_t p0 = task % groups * per_group, range = task / groups;
    const int64_t end = std::min((range + 1) * per_range, rows);
    for (int64_t r0 = range * per_range; r0 < end; r0 += block) {
      const int n = static_cast<int>(std::min<int64_t>(block, end - r0));
      take(r0, n);
      for (int64_t p = p0; p < std::min(p0 + per_group, panels); ++p) {
        with(r0, n, p);
      }
    }
  }

  int64_t rows, panels, groups, per_group, per_range, ranges;
  int64_t block = kBlock;  // rows at a time
  int64_t copy = 0;        // bytes of them, where they are copied
};

// Runs task(begin, end) over [0, count) in a few ranges, each of which can keep its scratch.
template <class Task>
void parallel_ranges(int64_t count, int threads, const Task& task) {
  const int64_t each = ceil_div(count, threads > 1 ? 8 * threads : 1);
  parallel_for(ceil_div(count, each), threads,
               [&](int64_t range) { task(range * each, std::min((range + 1) * each, count)); });
}

inline Vec silu(Vec x) {
  const Vec e =
      exp_from_lowest(at_least(as_float(as_int(x) | INT32_MIN), splat(kLowest)));  // e^-|x|
  return x * select(x < 0.0f, e, splat(1.0f)) / (e + 1.0f);
}

inline Vec gelu(Vec x) {
  return 0.5f * x * (tanh(0.797884561f * (x + 0.044715f * (x * x * x))) + 1.0f);
}

// 1 / sqrt(mean x^2 + eps) over n features, `stride` floats apart.
inline Vec inverse_rms(const float* x, int64_t n, int64_t stride, float eps) {
  Vec sums[4] = {};
  const auto add = [&](int64_t k, Vec& sum) {
    const Vec v = load(x + k * stride);
    sum = fma(v, v, sum);
  };
  int64_t k = 0;
  for (; k + 4 <= n; k += 4) {
    for (int i = 0; i < 4; ++i) {
      add(k + i, sums[i]);
    }
  }
  for (; k < n; ++k) {
    add(k, sums[0]);
  }
  const Vec mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
  return 1.0f / sqrt(mean + eps);
}

// Lane i: the sum over the lanes of x[i].
template <int Block = 1>
inline Vec sums_of(Vec (&x)[kLanes]) {
  if constexpr (Block < kLanes) {
    for (int i = 0; i < kLanes; i += 2 * Block) {
      swap_blocks<Block>(x[i], x[i + Block], std::make_integer_sequence<int, kLanes>());
      x[i] += x[i + Block];
    }
    return sums_of<2 * Block>(x);
  }
  return x[0];
}

// Features of a vector of rows, [n] of `stride` floats, row by row: keep(i, k, x) gets kLanes of
// row i from feature k on, zeros beyond the last one.
template <class Keep>
void each_row(const float* from, int64_t n, int64_t stride, const Keep& keep) {
  for (int64_t k = 0; k < n; k += kLanes) {
    Vec tile[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = k + i < n ? load(from + (k + i) * stride) : Vec{};
    }
    transpose(tile);
    for (int i = 0; i < kLanes; ++i) {
      keep(i, k, tile[i]);
    }
  }
}

// As rows [kLanes][round_up(n, kLanes)].
inline void to_rows(const float* from, int64_t n, int64_t stride, float* rows) {
  const int64_t width = round_up(n, kLanes);
  each_row(from, n, stride, [&](int i, int64_t k, Vec x) { store(rows + i * width + k, x); });
}

// And back: `rows` pointers to at least round_up(n, kLanes) floats each, null for a row of zeros.
inline void to_lanes(const float* const* rows, int64_t n, int64_t stride, float* to) {
  for (int64_t k = 0; k < n; k += kLanes) {
    Vec tile[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      tile[i] = rows[i] ? load(rows[i] + k) : Vec{};
    }
    transpose(tile);
    for (int i = 0; i < std::min<int64_t>(kLanes, n - k); ++i) {
      store(to + (k + i) * stride, tile[i]);
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Attention over shared prompts on a CPU: forward and backward, a block of scores at a time.
//
// Queries ride in lanes (queries.h). For a chunk of columns the keys are walked once, those of the
// prompt first and then those of the columns' own segments; a block of keys times a panel of
// columns is computed into a small buffer, and what follows (maximum, exponentials, sums) runs
// down its rows:
//
//             prompt's keys          own keys          One running maximum and one sum of
//   panel 0  [ s s s | s s s ]    [ s s ]              exponentials over both parts: nothing
//   panel 1  [ s s s | s s s ]    [ s s | s ]          partial is ever rounded or merged.
//
// The backward walks the same blocks: scores again, their gradients, then all three products. The
// chunks of a group add to the gradients of its keys in turn.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

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
  void write(const Queries& queries, int64_t p, const float* factor, void* to) const {
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
      from_floats(rows_.get() + (i - p * kPanel) * padded, a_.type, a_.width,
                  static_cast<char*>(to) + at * bytes(a_.type));
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

template <class Kind>
class Forward : Worker<Kind> {
 public:
  using Element = typename Kind::Element;

  explicit Forward(const AttentionForwardArgs& args)
      : Worker<Kind>(args.at), args_(args), q_(kColumns * this->steps_) {}

  void run(const Chunk& chunk) {
    const AttentionArgs& a = args_.at;
    const Queries queries(a, chunk);
    this->gather(queries, a.q);
    this->pack_depth(queries, q_.get());
    for (int64_t p = 0; p < queries.panels(); ++p) {
      std::fill_n(running_[p].max, kPanel, -FLT_MAX);
      std::fill_n(running_[p].sum, kPanel, 0.0f);
      std::fill_n(this->sums(p), kPanel * round_up(a.width, kLanes), 0.0f);
    }
    queries.for_each_block([&](int side, int64_t first, int64_t most, int64_t p0, int64_t p1) {
      this->keys_.take(chunk.head, first, most);
      this->values_.take(chunk.head, first, most);
      this->values_.transpose();
      for (int64_t p = p0; p < p1; ++p) {
        const Seen& seen = queries.seen(side, p);
        const int64_t n = std::min<int64_t>(most, seen.last - first);
        if (n <= 0) {
          continue;
        }
        const bool masked = this->masked(seen, first, n);
        const int vectors = queries.vectors(p);
        float factor[kPanel];
        IVec sees[kVectors];
        this->sees_some(seen, first, n, sees);
        this->keys_.multiply(n, q_.get() + p * kPanel * this->steps_, vectors, this->z_.get());
        fold(seen, first, n, masked, vectors, running_[p], factor);
        this->values_.add_transposed(n, reinterpret_cast<const Element*>(this->z_.get()), vectors,
                                     masked ? sees : nullptr, factor, this->c_.get(),
                                     this->sums(p));
      }
    });
    for (int64_t p = 0; p < queries.panels(); ++p) {
      finish(queries, p);
    }
  }

 private:
  // Per column: the maximum of the scores in units of ln 2, and, relative to it, their sum.
  struct Running {
    float max[kPanel], sum[kPanel];
  };

  // Scores z become exponentials, packed as depth of the next product, in place.
  void fold(const Seen& seen, int64_t first, int64_t n, bool masked, int vectors, Running& to,
            float* factor) const {
    const AttentionArgs& a = args_.at;
    const float unit = (a.softcap > 0.0f ? a.softcap : a.scale) * kLog2E;
    for (int j = 0; j < vectors; ++j) {
      const int at = j * kLanes;
      float* z = this->z_.get() + at;
      if (a.softcap > 0.0f) {
        for (int64_t r = 0; r < n; ++r) {
          store(z + r * kPanel, tanh(load(z + r * kPanel) * (a.scale / a.softcap)));
        }
      }
      if (masked) {
        for (int64_t r = 0; r < n; ++r) {
          const Vec x = load(z + r * kPanel);
          store(z + r * kPanel, select(visible(seen, at, first + r), x, splat(-INFINITY)));
        }
      }
      Vec highest = splat(-INFINITY), also = highest;
      int64_t row = 0;
      for (; row + 2 <= n; row += 2) {  // two chains: each step waits for the one before
        highest = at_least(load(z + row * kPanel), highest);
        also = at_least(load(z + (row + 1) * kPanel), also);
      }
      if (row < n) {
        highest = at_least(load(z + row * kPanel), highest);
      }
      highest = at_least(highest, also);
      const Vec before = load(to.max + at), max = at_least(highest * unit, before);
      const Vec down = exp2(before - max);
      Vec sum = load(to.sum + at) * down;
      for (int64_t r = 0; r < n; r += Kind::kStep) {
        Vec e[Kind::kStep] = {};
        for (int i = 0; i < Kind::kStep && r + i < n; ++i) {
          e[i] = exp2(fma(load(z + (r + i) * kPanel), splat(unit), -max));
          sum += e[i];
        }
        store_depth(Kind(), reinterpret_cast<Element*>(z + r / Kind::kStep * kPanel), e);
      }
      store(to.max + at, max);
      store(to.sum + at, sum);
      store(factor + at, down);
    }
  }

  void finish(const Queries& queries, int64_t p) const {
    const Running& running = running_[p];
    float inverse[kPanel] = {};
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, queries.count() - p * kPanel); ++i) {
      const int64_t column = p * kPanel + i;
      inverse[i] = 1.0f / running.sum[i];
      args_.lse[queries.token(column) * args_.at.heads + queries.head(column)] =
          running.max[i] * kLn2 + std::log(running.sum[i]);
    }
    this->write(queries, p, inverse, args_.out);
  }

  const AttentionForwardArgs& args_;
  Running running_[kPanels];
  Buffer<Element> q_;  // [panel][D / kStep][kPanel]
};

// Lets chunks of one group and head add to the gradients of keys in the order of their indices.
//
// A chunk adds to blocks of keys in the order of the keys, and says so after each one. The one
// behind it may then add there too: it waits for its neighbour alone, whose word holds for all
// before. A chunk never waits for one that was not started before it.
class Turns {
 public:
  Turns(const AttentionArgs& a) : a_(a), first_(a.groups + 1) {
    for (int64_t g = 0; g < a.groups; ++g) {
      first_[g + 1] = first_[g] + Chunk::count(a, g) * a.kv_heads;
    }
    done_.reset(new std::atomic<int64_t>[first_[a.groups]]());
  }

  // Until the chunks before have added what they add to the keys [begin, end).
  void wait(const Chunk& chunk, int64_t begin, int64_t end) const {
    if (chunk.index == 0) {
      return;
    }
    // The one before sees no key from here on.
    const int64_t share = a_.heads / a_.kv_heads;
    const int64_t last =
        a_.offsets[a_.group_offsets[chunk.group]] + ceil_div(chunk.index * kColumns, share);
    if (begin < last) {
      const auto& before = done_[at(chunk) - a_.kv_heads];
      while (before.load(std::memory_order_acquire) < std::min(end, last)) {
        std::this_thread::yield();
      }
    }
  }

  void done(const Chunk& chunk, int64_t end) const {
    done_[at(chunk)].store(end, std::memory_order_release);
  }

 private:
  int64_t at(const Chunk& chunk) const {
    return first_[chunk.group] + chunk.index * a_.kv_heads + chunk.head;
  }

  const AttentionArgs& a_;
  std::vector<int64_t> first_;
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

// Gradients of keys and values, [T, Hkv, D] floats.
struct KeyGradients {
  float *k, *v;
};

template <class Kind>
class Backward : Worker<Kind> {
 public:
  using Element = typename Kind::Element;

  Backward(const AttentionBackwardArgs& args, const KeyGradients& to, const Turns& turns)
      : Worker<Kind>(args.at),
        args_(args),
        to_(to),
        turns_(turns),
        width_(round_up(args.at.width, kPanel)),
        q_(kColumns * this->steps_),
        grad_out_(kColumns * this->steps_),
        q_rows_(kColumns / Kind::kStep * width_),
        grad_out_rows_(kColumns / Kind::kStep * width_),
        dp_(kKeys * kPanel),
        p_(kKeys * kColumns / Kind::kStep),
        ds_(kKeys * kColumns / Kind::kStep) {}

  void run(const Chunk& chunk) {
    const AttentionArgs& a = args_.at;
    const Queries queries(a, chunk);
    this->gather(queries, a.q);
    pack(queries, q_.get(), q_rows_.get());
    this->gather(queries, args_.grad_out);
    pack(queries, grad_out_.get(), grad_out_rows_.get());
    take_statistics(queries);
    for (int64_t p = 0; p < queries.panels(); ++p) {
      std::fill_n(this->sums(p), kPanel * round_up(a.width, kLanes), 0.0f);
    }
    bool in_prompt = true;
    const auto leave_prompt = [&] {
      turns_.wait(chunk, 0, queries.prompt_end());
      turns_.done(chunk, queries.prompt_end());
      in_prompt = false;
    };
    queries.for_each_block([&](int side, int64_t first, int64_t n, int64_t p0, int64_t p1) {
      if (in_prompt && side == 1) {
        leave_prompt();
      }
      this->keys_.take(chunk.head, first, n);
      this->keys_.transpose();
      this->values_.take(chunk.head, first, n);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t seen = std::clamp<int64_t>(queries.seen(side, p).last - first, 0, n);
        if (seen > 0) {
          differentiate(queries, side, first, seen, p);
        }
        clear(seen, n, p);
      }
      turns_.wait(chunk, first, first + n);
      const int64_t at = (first * a.kv_heads + chunk.head) * a.width;
      add_product(p_.get(), n, p0, p1, grad_out_rows_.get(), to_.v + at);
      add_product(ds_.get(), n, p0, p1, q_rows_.get(), to_.k + at);
      turns_.done(chunk, first + n);
    });
    if (in_prompt) {
      leave_prompt();
    }
    turns_.done(chunk, INT64_MAX);
    float ones[kPanel];
    std::fill_n(ones, kPanel, 1.0f);
    for (int64_t p = 0; p < queries.panels(); ++p) {
      this->write(queries, p, ones, args_.grad_q);
    }
  }

 private:
  // What was gathered as B, with depth D and with the columns as depth.
  void pack(const Queries& queries, Element* depth, Element* rows) const {
    this->pack_depth(queries, depth);
    const Float type = Kind::kStep == 1 ? Float::f32 : Float::bf16;
    pack_rows(Kind(), reinterpret_cast<const char*>(this->columns_.get()),
              this->padded_ * Kind::kStep, type, 0, queries.panels() * kPanel, args_.at.width,
              kColumns, rows);
  }

  // lse in units of ln 2, and delta = grad_out . out - grad_lse.
  void take_statistics(const Queries& queries) {
    const AttentionArgs& a = args_.at;
    Buffer<float> x(2 * round_up(a.width, kLanes));
    float *out = x.get(), *grad = out + round_up(a.width, kLanes);
    std::fill_n(out, 2 * round_up(a.width, kLanes), 0.0f);
    std::fill_n(lse_, kColumns, INFINITY);  // no column: every probability is 0
    std::fill_n(delta_, kColumns, 0.0f);
    for (int64_t i = 0; i < queries.count(); ++i) {
      const int64_t t = queries.token(i), h = queries.head(i);
      to_floats(row_of(args_.out, a.type, t, h), a.type, a.width, out);
      to_floats(row_of(args_.grad_out, a.type, t, h), a.type, a.width, grad);
      Vec sum = {};
      for (int64_t d = 0; d < a.width; d += kLanes) {
        sum = fma(load(out + d), load(grad + d), sum);
      }
      for (int l = 0; l < kLanes; ++l) {
        delta_[i] += sum[l];
      }
      delta_[i] -= args_.grad_lse ? args_.grad_lse[t * a.heads + h] : 0.0f;
      lse_[i] = args_.lse[t * a.heads + h] * kLog2E;
    }
  }

  // Probabilities and gradients of the scores of a block for the columns of a panel; adds to theirs
  // of q.
  void differentiate(const Queries& queries, int side, int64_t first, int64_t n, int64_t p) const {
    const AttentionArgs& a = args_.at;
    const Seen& seen = queries.seen(side, p);
    const bool masked = this->masked(seen, first, n), capped = a.softcap > 0.0f;
    const float unit = (capped ? a.softcap : a.scale) * kLog2E;
    this->keys_.multiply(n, q_.get() + p * kPanel * this->steps_, kVectors, this->z_.get());
    this->values_.multiply(n, grad_out_.get() + p * kPanel * this->steps_, kVectors, dp_.get());
    for (int j = 0; j < kVectors; ++j) {
      const int at = j * kLanes;
      float* z = this->z_.get() + at;
      const Vec lse = load(lse_ + p * kPanel + at), delta = load(delta_ + p * kPanel + at);
      for (int64_t r = 0; r < n; r += Kind::kStep) {
        Vec gradient[Kind::kStep] = {};
        for (int i = 0; i < Kind::kStep && r + i < n; ++i) {
          const int64_t row = ((r + i) * kColumns + p * kPanel + at) / Kind::kStep;
          Vec x = load(z + (r + i) * kPanel), slope = splat(a.scale);
          if (capped) {
            x = tanh(x * (a.scale / a.softcap));
            slope = slope * (1.0f - x * x);
          }
          Vec e = exp2(fma(x, splat(unit), -lse));
          Vec g = e * (load(dp_.get() + (r + i) * kPanel + at) - delta) * slope;
          if (masked) {
            const IVec where = visible(seen, at, first + r + i);
            e = select(where, e, Vec{});
            g = select(where, g, Vec{});
          }
          store_row(Kind(), p_.get() + row, e);
          store_row(Kind(), ds_.get() + row, g);
          gradient[i] = g;
        }
        store_depth(Kind(), reinterpret_cast<Element*>(z + r / Kind::kStep * kPanel), gradient);
      }
    }
    float ones[kPanel];
    std::fill_n(ones, kPanel, 1.0f);
    IVec sees[kVectors];
    this->sees_some(seen, first, n, sees);
    this->keys_.add_transposed(n, reinterpret_cast<const Element*>(this->z_.get()), kVectors,
                               masked ? sees : nullptr, ones, this->c_.get(), this->sums(p));
  }

  // What no column of the panel sees of a block, keys [seen, n), adds nothing to their gradients.
  void clear(int64_t seen, int64_t n, int64_t p) const {
    constexpr int64_t kWords = kPanel / Kind::kStep;
    for (int64_t r = seen; r < n; ++r) {
      const int64_t at = r * (kColumns / Kind::kStep) + p * kWords;
      std::fill_n(p_.get() + at, kWords, Element{});
      std::fill_n(ds_.get() + at, kWords, Element{});
    }
  }

  // to[n x D] += A[n x columns] * B[columns x D], for the columns of panels [p0, p1).
  void add_product(const Element* from, int64_t n, int64_t p0, int64_t p1, const Element* packed,
                   float* to) const {
    const AttentionArgs& a = args_.at;
    const int64_t skipped = p0 * kPanel / Kind::kStep, steps = (p1 - p0) * kPanel / Kind::kStep;
    Rows rows;
    rows.data = reinterpret_cast<const char*>(from + skipped);
    rows.stride = sizeof(Element);
    for (int64_t b = 0; b < n; b += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, n - b));
      for (int r = 0; r < kBlock; ++r) {
        rows.row[r] = (b + std::min(r, count - 1)) * (kColumns / Kind::kStep * sizeof(Element));
      }
      for (int64_t d = 0; d < a.width; d += kPanel) {
        const int64_t width = std::min<int64_t>(kPanel, a.width - d);
        multiply<Kind>(rows, count, steps, packed + d * (kColumns / Kind::kStep) + skipped * kPanel,
                       Queries::vectors_of(width), this->c_.get());
        for (int r = 0; r < count; ++r) {
          float* sum = to + (b + r) * a.kv_heads * a.width + d;
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += this->c_[r * kPanel + i];
          }
        }
      }
    }
  }

  const AttentionBackwardArgs& args_;
  const KeyGradients to_;
  const Turns& turns_;
  const int64_t width_;
  float lse_[kColumns], delta_[kColumns];
  Buffer<Element> q_, grad_out_;            // [panel][D / kStep][kPanel]
  Buffer<Element> q_rows_, grad_out_rows_;  // [D / kPanel][kColumns / kStep][kPanel]
  Buffer<float> dp_;
  Buffer<Element> p_, ds_;  // [kKeys][kColumns / kStep]
};

// All chunks, those of one group and head in order, neighbours far apart.
std::vector<Chunk> all_chunks(const AttentionArgs& a) {
  std::vector<Chunk> all;
  bool more = true;
  for (int64_t index = 0; more; ++index) {
    more = false;
    for (int64_t g = 0; g < a.groups; ++g) {
      for (int64_t h = 0; h < a.kv_heads && index < Chunk::count(a, g); ++h) {
        all.push_back({g, h, index});
        more = true;
      }
    }
  }
  return all;
}

// Every thread takes its scratch once, then chunk after chunk in order.
template <class Make>
void for_each_chunk(const AttentionArgs& a, int threads, const Make& make) {
  const std::vector<Chunk> all = all_chunks(a);
  const int64_t count = static_cast<int64_t>(all.size());
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(threads, count), threads, [&](int64_t) {
    if (next.load(std::memory_order_relaxed) >= count) {
      return;
    }
    auto worker = make();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      worker->run(all[i]);
    }
  });
}

template <class Kind>
void forward(const AttentionForwardArgs& args, int threads) {
  for_each_chunk(args.at, threads, [&] { return std::make_unique<Forward<Kind>>(args); });
}

template <class Kind>
void backward(const AttentionBackwardArgs& args, int threads) {
  const AttentionArgs& a = args.at;
  const bool own = a.type != Float::f32;
  const int64_t row = a.kv_heads * a.width;
  Buffer<float> k(own ? a.tokens * row : 0), v(own ? a.tokens * row : 0);
  const KeyGradients sums =
      own ? KeyGradients{k.get(), v.get()}
          : KeyGradients{static_cast<float*>(args.grad_k), static_cast<float*>(args.grad_v)};
  const int64_t blocks = ceil_div(a.tokens, kKeys);
  const auto for_each_part = [&](const auto& visit) {
    parallel_for(blocks, threads, [&](int64_t b) {
      visit(b * kKeys * row, std::min(kKeys, a.tokens - b * kKeys) * row);
    });
  };
  for_each_part([&](int64_t at, int64_t n) {
    std::fill_n(sums.k + at, n, 0.0f);
    std::fill_n(sums.v + at, n, 0.0f);
  });
  const Turns turns(a);
  for_each_chunk(a, threads, [&] { return std::make_unique<Backward<Kind>>(args, sums, turns); });
  if (own) {
    for_each_part([&](int64_t at, int64_t n) {
      from_floats(sums.k + at, a.type, n, static_cast<char*>(args.grad_k) + at * bytes(a.type));
      from_floats(sums.v + at, a.type, n, static_cast<char*>(args.grad_v) + at * bytes(a.type));
    });
  }
}

// Pairs need rows of bf16 that end on a pair.
[[maybe_unused]] bool use_pairs(const AttentionArgs& a) {
  return a.type == Float::bf16 && a.width % 2 == 0;
}

}  // namespace

void shared_prefix_attention_fwd(const AttentionForwardArgs& args, int threads) {
#if defined(__AVX512BF16__)
  if (use_pairs(args.at)) {
    return forward<Pairs>(args, threads);
  }
#endif
  forward<Floats>(args, threads);
}

void shared_prefix_attention_bwd(const AttentionBackwardArgs& args, int threads) {
#if defined(__AVX512BF16__)
  if (use_pairs(args.at)) {
    return backward<Pairs>(args, threads);
  }
#endif
  backward<Floats>(args, threads);
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

// The backward of attention over shared prompts: scores again, a block at a time, their gradients,
// and all three products while the block is in cache.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "keys.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

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
      // A turn takes tens of microseconds; longer, and its thread has lost its core to another.
      for (int tries = 0; before.load(std::memory_order_acquire) < std::min(end, last); ++tries) {
        if (tries < 50) {
          std::this_thread::yield();
        } else {
          std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
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
  using Kept = typename Kind::Kept;

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
        p_(kKeys * kColumns),
        ds_(kKeys * kColumns) {}

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
      if (args_.rest) {
        add_rest(out, a.type, a.width, args_.rest + (t * a.heads + h) * a.width);
      }
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
          const int64_t to = (r + i) * kColumns + p * kPanel + at;
          Vec x = load(z + (r + i) * kPanel), slope = splat(a.scale);
          if (capped) {
            x = tanh(x * (a.scale / a.softcap));
            slope = slope * (1.0f - x * x);
          }
          Vec e = exp2(at_most(fma(x, splat(unit), -lse), Vec{}));
          Vec g = e * (load(dp_.get() + (r + i) * kPanel + at) - delta) * slope;
          if (masked) {
            const IVec where = visible(seen, at, first + r + i);
            e = select(where, e, Vec{});
            g = select(where, g, Vec{});
          }
          Kind::keep(e, p_.get() + to);
          Kind::keep(g, ds_.get() + to);
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
    for (int64_t r = seen; r < n; ++r) {
      std::fill_n(p_.get() + r * kColumns + p * kPanel, kPanel, Kept{});
      std::fill_n(ds_.get() + r * kColumns + p * kPanel, kPanel, Kept{});
    }
  }

  // to[n x D] += A[n x columns] * B[columns x D], for the columns of panels [p0, p1).
  void add_product(const Kept* from, int64_t n, int64_t p0, int64_t p1, const Element* packed,
                   float* to) const {
    const AttentionArgs& a = args_.at;
    const int64_t skipped = p0 * kPanel / Kind::kStep, steps = (p1 - p0) * kPanel / Kind::kStep;
    Rows rows;
    rows.data = reinterpret_cast<const char*>(from + p0 * kPanel);
    rows.stride = sizeof(Element);
    for (int64_t b = 0; b < n; b += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, n - b));
      for (int r = 0; r < kBlock; ++r) {
        rows.row[r] = (b + std::min(r, count - 1)) * kColumns * sizeof(Kept);
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
  Buffer<Kept> p_, ds_;  // [kKeys][kColumns]
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

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

#include <cmath>

#include "attention_backward.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

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
          // The product is rounded as the highest was: of 1e9 and more, that changes it by 64.
          e[i] = exp2(load(z + (r + i) * kPanel) * unit - max);
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
    this->write(queries, p, inverse, args_.out, args_.rest);
  }

  const AttentionForwardArgs& args_;
  Running running_[kPanels];
  Buffer<Element> q_;  // [panel][D / kStep][kPanel]
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
#ifdef FASTRL_PAIRS
  if (use_pairs(args.at)) {
    return forward<Pairs>(args, threads);
  }
#endif
  forward<Floats>(args, threads);
}

void shared_prefix_attention_bwd(const AttentionBackwardArgs& args, int threads) {
#ifdef FASTRL_PAIRS
  if (use_pairs(args.at)) {
    return backward<Pairs>(args, threads);
  }
#endif
  backward<Floats>(args, threads);
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

// Sampling from the lm-head on a CPU, a block of logits at a time.
//
// The vocabulary is walked as in logprob.cpp, in the same chunks and with the same running
// statistics, so a token's log-prob has the bits of linear_logprob. While a block is in cache,
//
//   untruncated   each logit's noise bits are drawn, and the few that can win get their Gumbel
//   greedy        the running maximum keeps its place
//   truncated     the block is transposed into rows of logits: of a group of rows that fits in
//                 kKeptBytes (or one panel), each of which is then cut down and drawn from
//
// Ties go to the first entry.
#include "sample.h"

#include "linear_bytes.h"
#include "running.h"
#include "truncate.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kKeptBytes = 128 << 20;
constexpr float kOutOfReach = 80.0f;  // of noise; e^-80 is no subnormal, which would take long

// The best perturbed logit so far, or with greedy the best logit; a lane per token.
struct Best {
  float value[kPanel], z[kPanel];
  float bar[kPanel];  // z below it by e^-u cannot win
  int32_t token[kPanel];
};

// Of the vocabulary, or a few more: each sets out with nothing to beat.
constexpr int64_t kWalks = 64;

template <class Kind>
class Sampler {
 public:
  Sampler(const SampleArgs& args, int threads)
      : args_(args),
        a_(args.linear),
        threads_(threads),
        top_k_(args.top_k < a_.vocab ? args.top_k : 0),
        truncated_(!args.greedy && (top_k_ > 0 || args.top_p < 1.0 || args.min_p > 0.0)),
        chunk_(chunk_rows(a_)),
        chunks_(ceil_div(a_.vocab, chunk_)),
        walk_(std::max<int64_t>(a_.vocab / kWalks / chunk_, 1) * chunk_),
        walks_(ceil_div(a_.vocab, walk_)),
        stride_(round_up(a_.vocab, kBlock)),
        capacity_(at_once()),
        panels_(ceil_div(capacity_, kPanel)),
        tokens_(a_, capacity_),
        running_(chunks_ * panels_),
        best_(truncated_ ? 0 : walks_ * panels_),
        inv_temperature_(panels_ * kPanel),
        streams_(panels_ * kPanel),
        kept_(truncated_ ? capacity_ * stride_ : 0) {}

  void run() {
    for (int64_t first = 0; first < a_.rows; first += capacity_) {
      take_tokens(first);
      // Which tokens a task takes changes who computes, not what.
      const int64_t groups = std::min(tokens_.panels(), ceil_div(4 * threads_, walks_));
      const int64_t per_group = ceil_div(tokens_.panels(), groups);
      parallel_for(walks_ * groups, threads_, [&](int64_t task) {
        const int64_t p0 = task % groups * per_group;
        walk(task / groups, p0, std::min(p0 + per_group, tokens_.panels()));
      });
      parallel_for(tokens_.count(), threads_, [&](int64_t t) { finish(t); });
    }
  }

 private:
  int64_t at_once() const {
    const int64_t all = tokens_at_once<Kind>(a_);
    const int64_t fit = kKeptBytes / 4 / stride_ / kPanel * kPanel;
    return truncated_ ? std::min<int64_t>(all, std::max<int64_t>(fit, kPanel)) : all;
  }

  void take_tokens(int64_t first) {
    tokens_.pack(first, std::min(capacity_, a_.rows - first), threads_);
    std::fill_n(inv_temperature_.get(), panels_ * kPanel, 0.0f);
    std::copy_n(a_.inv_temperature + first, tokens_.count(), inv_temperature_.get());
    std::fill_n(streams_.get(), panels_ * kPanel, 0);
    for (int64_t t = 0; t < tokens_.count(); ++t) {
      streams_[lane_of_stream(t)] =
          noise_stream(args_.seeds[first + t], args_.positions[first + t]);
    }
  }

  // A vector's even lanes come before its odd ones.
  static int64_t lane_of_stream(int64_t t) {
    const int64_t lane = t % kLanes;
    return t - lane + lane % 2 * (kLanes / 2) + lane / 2;
  }

  void walk(int64_t w, int64_t p0, int64_t p1) const {
    Buffer<float> z(kBlock * kPanel), scratch(kBlock * round_up(a_.width, 32));
    const int64_t end = std::min((w + 1) * walk_, a_.vocab);
    for (int64_t v0 = w * walk_; v0 < end; v0 += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, end - v0));
      const Rows rows = tokens_.weight_rows(v0, n, scratch.get());
      for (int64_t p = p0; p < p1; ++p) {
        const float* inv_temperature = inv_temperature_.get() + p * kPanel;
        tokens_.logits(&rows, v0, n, p, z.get());
        Folding<Floats> folding;
        folding.start(
            z.get(), n, tokens_.vectors(p), inv_temperature, v0 % chunk_ == 0,
            running_[v0 / chunk_ * panels_ + p], [](int64_t) { return KeptBlock<Floats>(); }, 1);
        folding.finish();
        if (truncated_) {
          keep(v0, n, p, z.get());
          continue;
        }
        Best& best = best_[w * panels_ + p];
        if (v0 == w * walk_) {
          start(p, v0, best);
        }
        for (int at = 0; at < tokens_.vectors(p) * kLanes; at += kLanes) {
          if (args_.greedy) {
            climb(z.get() + at, v0, n, at, best);
          } else {
            perturb(z.get() + at, v0, n, at, load(inv_temperature + at),
                    streams_.get() + p * kPanel + at, best);
          }
        }
      }
    }
  }

  void start(int64_t p, int64_t v0, Best& best) const {
    for (int64_t i = 0; i < kPanel; ++i) {
      const bool live = i < tokens_.in_panel(p);  // nothing wins in a lane without a token
      best.value[i] = live ? -kInfinity : kInfinity;
      best.bar[i] = live ? -kInfinity : kOutOfReach;
      best.z[i] = -kInfinity;
      best.token[i] = static_cast<int32_t>(v0);
    }
  }

  static void climb(const float* z, int64_t v0, int n, int at, Best& best) {
    Vec highest = load(best.value + at);
    IVec token;
    std::memcpy(&token, best.token + at, sizeof token);
    for (int r = 0; r < n; ++r) {
      const Vec x = load(z + r * kPanel);
      const IVec higher = x > highest;
      highest = select(higher, x, highest);
      token = higher ? IVec{} + static_cast<int32_t>(v0 + r) : token;
    }
    store(best.value + at, highest);
    store(best.z + at, highest);
    std::memcpy(best.token + at, &token, sizeof token);
  }

  static void perturb(const float* z, int64_t v0, int n, int at, Vec inv_temperature,
                      const uint64_t* streams, Best& best) {
    Vec bar = load(best.bar + at);
    for (int r = 0; r < n; ++r) {
      const Vec x = load(z + r * kPanel) * inv_temperature;
      const Bits bits = noise_bits(streams, v0 + r);
      const IVec may_win = about_uniform(bits) <= exp(x - bar);
      if (__builtin_expect(any(may_win), 0)) {
        for (int i = 0; i < kLanes; ++i) {
          const float value = may_win[i] ? x[i] + gumbel(bits[i]) : -kInfinity;
          if (value > best.value[at + i]) {
            best.value[at + i] = value;
            best.bar[at + i] = below(value);
            best.z[at + i] = x[i];
            best.token[at + i] = static_cast<int32_t>(v0 + r);
          }
        }
        bar = load(best.bar + at);
      }
    }
  }

  void keep(int64_t v0, int n, int64_t p, const float* z) const {
    static_assert(kBlock % kLanes == 0, "a row of logits has room for whole tiles");
    for (int at = 0; at < tokens_.vectors(p) * kLanes; at += kLanes) {
      const Vec inv_temperature = load(inv_temperature_.get() + p * kPanel + at);
      const int64_t t = p * kPanel + at, count = std::min<int64_t>(kLanes, tokens_.count() - t);
      for (int r = 0; r < n; r += kLanes) {
        Vec tile[kLanes] = {};
        for (int i = 0; i < std::min(kLanes, n - r); ++i) {
          tile[i] = load(z + (r + i) * kPanel + at) * inv_temperature;
        }
        transpose(tile);
        for (int64_t i = 0; i < count; ++i) {
          store(kept_.get() + (t + i) * stride_ + v0 + r, tile[i]);
        }
      }
    }
  }

  void finish(int64_t t) const {
    const int64_t p = t / kPanel, i = t % kPanel, row = tokens_.first() + t;
    const Merged all = merge(running_.get() + p, chunks_, panels_, i);
    Draw drawn = {0, 0.0f};
    float z = -kInfinity;
    if (!truncated_) {
      float value = -kInfinity;
      for (int64_t w = 0; w < walks_; ++w) {
        const Best& best = best_[w * panels_ + p];
        if (best.value[i] > value) {
          value = best.value[i];
          z = best.z[i];
          drawn.token = best.token[i];
        }
      }
      drawn.logprob = args_.greedy ? 0.0f : z - all.max - all.log_sum;
    } else {
      float* logits = kept_.get() + t * stride_;
      const bool proper = std::fabs(all.max) < FLT_MAX && std::isfinite(all.log_sum);
      drawn = proper ? cut_and_draw(logits, all.max, t) : highest_of(logits);
      z = logits[drawn.token];
    }
    args_.token[row] = drawn.token;
    args_.logprob[row] = drawn.logprob;
    args_.untruncated[row] = z - all.max - all.log_sum;
  }

  Draw cut_and_draw(float* logits, float highest, int64_t t) const {
    TruncatedRow row(logits, a_.vocab, stride_, highest);
    if (top_k_ > 0) {
      row.top_k(top_k_);
    }
    if (args_.top_p < 1.0) {
      row.top_p(args_.top_p);
    }
    if (args_.min_p > 0.0) {
      row.min_p(args_.min_p);
    }
    return row.draw(streams_[lane_of_stream(t)]);
  }

  // Logits that are no distribution (NaN, inf, all -inf) have no log-prob either.
  Draw highest_of(const float* logits) const {
    return {std::max_element(logits, logits + a_.vocab) - logits,
            std::numeric_limits<float>::quiet_NaN()};
  }

  const SampleArgs& args_;
  const LinearArgs& a_;
  const int threads_;
  const int64_t top_k_;
  const bool truncated_;
  const int64_t chunk_, chunks_;  // of the statistics
  const int64_t walk_, walks_;    // chunks that a thread takes in one go, with one best logit
  const int64_t stride_;          // of the kept rows
  const int64_t capacity_, panels_;
  Tokens<Kind> tokens_;
  Buffer<Running> running_;
  Buffer<Best> best_;
  Buffer<float> inv_temperature_;
  Buffer<uint64_t> streams_;
  Buffer<float> kept_;  // [capacity, stride]
};

}  // namespace

void linear_sample(const SampleArgs& args, int threads) {
  threads = worth_waking(args.linear, threads);
  if (args.linear.int8.scale) {
    return Sampler<Int8>(args, threads).run();
  }
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return Sampler<Pairs>(args, threads).run();
  }
#endif
  Sampler<Floats>(args, threads).run();
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

// The lm-head's log-probs on a CPU: forward and backward, a block of logits at a time.
//
// Tokens ride in lanes. A block of kBlock vocabulary rows times a panel of kPanel tokens is
// computed into a small buffer and folded down the rows into running maxima and sums, one per
// token:
//
//                 panel 0   panel 1  ...            chunk of the vocabulary: a fixed number of
//   block 0     [ z z z z ][ z z z z ]              rows, so that what is summed with what depends
//   block 1     [ z z z z ][ z z z z ]              on V alone; chunks are merged in order
//     ...         |
//                 v  max, sum exp(z - max), sum (z - max) exp(z - max)
//
// logprob_backward.h is the way back, or logprob_means.h where hidden's gradient alone is wanted.
#include "logprob.h"

#include "logprob_means.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

template <class Kind>
class Forward {
 public:
  Forward(const LogprobForwardArgs& args, int threads)
      : args_(args),
        a_(args.linear),
        threads_(threads),
        capacity_(tokens_at_once<Kind>(a_)),
        panels_(ceil_div(capacity_, kPanel)),
        chunk_(chunk_rows(a_)),
        chunks_(ceil_div(a_.vocab, chunk_)),
        plan_(make_plan<Kind>(a_, args.workspace)),
        tokens_(a_, capacity_),
        running_(chunks_ * panels_),
        at_target_(panels_ * kPanel),
        inv_temperature_(panels_ * kPanel) {}

  void run() {
    if (args_.means == nullptr) {
      return walk_tokens([&] { fold_chunks(0, chunks_, [](auto...) {}); }, [](auto...) {});
    }
    const Means<Kind> means(args_, tokens_, capacity_, chunk_, threads_);
    const auto fold = [&] {
      means.start();
      if (means.few()) {
        return means.add_chunks_of_few([&](int64_t c, auto take) {
          fold_chunk(c, 0, tokens_.panels(), [&](int64_t at, int n, int64_t p, float* z) {
            means.exponentiate(c * chunk_ + at, n, p, inv_temperature(p), z);
            take(at, n, p, z);
          });
        });
      }
      for (int64_t c0 = 0; c0 < chunks_; c0 += means.together()) {
        const int64_t count = std::min(means.together(), chunks_ - c0);
        fold_chunks(c0, count, [&](int64_t c, int64_t at, int n, int64_t p, float* z) {
          means.exponentiate(c * chunk_ + at, n, p, inv_temperature(p), z);
          means.keep(c - c0, c * chunk_ + at, at, n, p, z);
        });
        means.add_chunks(c0, count);
      }
    };
    walk_tokens(fold, [&](int64_t t, float lse) { means.finish(t, lse); });
  }

 private:
  template <class Fold, class Finish>
  void walk_tokens(Fold fold, Finish finish) {
    for (int64_t first = 0; first < a_.rows; first += capacity_) {
      tokens_.pack(first, std::min(capacity_, a_.rows - first), threads_);
      std::fill_n(inv_temperature_.get(), panels_ * kPanel, 0.0f);
      for (int64_t t = 0; t < tokens_.count(); ++t) {
        inv_temperature_[t] = a_.inv_temperature[a_.row(first + t)];
      }
      fold();
      parallel_for(tokens_.panels(), threads_, [&](int64_t p) {
        for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
          const Merged all = merge(running_.get() + p, chunks_, panels_, i);
          const int64_t t = p * kPanel + i, row = a_.row(first + t);
          args_.lse[row] = all.max + all.log_sum;
          args_.logprob[row] = at_target_[t] - all.max - all.log_sum;
          args_.entropy[row] = all.log_sum - all.weighted / all.sum;
          finish(t, args_.lse[row]);
        }
      });
    }
  }

  // Chunks of the logits into the statistics; take(c, at, n, p, z) has each block besides.
  template <class Take>
  void fold_chunks(int64_t c0, int64_t count, Take take) const {
    // Which tokens a task takes changes who computes, not what.
    const int64_t groups = std::min(tokens_.panels(), ceil_div(4 * threads_, count));
    const int64_t per_group = ceil_div(tokens_.panels(), groups);
    parallel_for(count * groups, threads_, [&](int64_t task) {
      const int64_t c = c0 + task / groups, p0 = task % groups * per_group;
      fold_chunk(c, p0, std::min(p0 + per_group, tokens_.panels()),
                 [&](int64_t at, int n, int64_t p, float* z) { take(c, at, n, p, z); });
    });
  }

  // Panels [p0, p1) of it; take(at, n, p, z) has the n rows from row `at` of the chunk on.
  template <class Take>
  void fold_chunk(int64_t c, int64_t p0, int64_t p1, Take take) const {
    const int64_t together = tokens_.blocks_together() * kBlock, size = tokens_.scratch();
    Buffer<float> z(2 * together * kPanel), scratch(together / kBlock * size);
    const int64_t first = c * chunk_, rows_of_chunk = std::min(chunk_, a_.vocab - first);
    if (args_.workspace.in_gradient && tokens_.first() == 0 && p0 == 0) {
      make_rows(args_.workspace.kept, a_.vocab, a_.width * bytes(a_.weight_type), first,
                rows_of_chunk);
    }
    Rows blocks[kMostBlocks];
    Folding<Kind> folding;
    struct {
      int64_t at, p, n = 0;
      float* z;
    } before, now;
    now.z = z.get();
    before.z = z.get() + together * kPanel;
    const auto block = [&](int64_t at, int64_t n) {
      return static_cast<int>(std::min<int64_t>(kBlock, n - at));
    };
    const auto finish = [&] {
      folding.finish();
      for (int64_t r = 0; r < before.n; r += kBlock) {
        take(before.at + r, block(r, before.n), before.p, before.z + r * kPanel);
      }
      before.n = 0;
    };
    for (now.at = 0; now.at < rows_of_chunk; now.at += together) {
      const int64_t v0 = first + now.at;
      now.n = std::min(together, rows_of_chunk - now.at);
      for (int64_t r = 0; r < now.n; r += kBlock) {
        const int64_t b = r / kBlock;
        blocks[b] = tokens_.weight_rows(v0 + r, block(r, now.n), scratch.get() + b * size);
      }
      for (now.p = p0; now.p < p1; ++now.p) {
        tokens_.logits(blocks, v0, now.n, now.p, now.z, folding);
        finish();
        take_targets(v0, now.n, now.p, now.z);
        folding.start(
            now.z, now.n, tokens_.vectors(now.p), inv_temperature(now.p), now.at == 0,
            running_[c * panels_ + now.p],
            [&](int64_t r) {
              return plan_.template kept_block<Kind>(args_.workspace.kept, v0 + r,
                                                     tokens_.first() / kPanel + now.p);
            },
            tokens_.steps(now.n));
        std::swap(before.z, now.z);
        before.at = now.at;
        before.n = now.n;
        before.p = now.p;
        if (!Made<Kind>::kTiles) {
          finish();
        }
      }
    }
    finish();
  }

  // The targets among n rows from v0 on.
  void take_targets(int64_t v0, int64_t n, int64_t p, const float* z) const {
    for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
      const int64_t t = p * kPanel + i, v = a_.target[a_.row(tokens_.first() + t)] - v0;
      if (v >= 0 && v < n) {
        at_target_[t] = z[v * kPanel + i] * inv_temperature_[t];
      }
    }
  }

  const float* inv_temperature(int64_t p) const { return inv_temperature_.get() + p * kPanel; }

  const LogprobForwardArgs& args_;
  const LinearArgs& a_;
  const int threads_;
  const int64_t capacity_, panels_;
  const int64_t chunk_, chunks_;
  const Plan plan_;
  Tokens<Kind> tokens_;
  Buffer<Running> running_;
  Buffer<float> at_target_, inv_temperature_;
};

// Each gradient in a walk of its own, where one for all is not what the plan says: grad_weight
// last, as what is kept may lie where it writes.
template <class Kind>
void backward_in_walks(const LogprobBackwardArgs& args, int threads) {
  const bool weight = args.grad_weight || args.grad_bias;
  if (!args.grad_hidden || !weight || args.linear.hidden_type == Float::f32 ||
      make_plan<Kind>(args.linear, args.workspace).one_walk) {
    return Backward<Kind>(args, threads).run();
  }
  LogprobBackwardArgs hidden = args, others = args;
  hidden.grad_weight = nullptr;
  hidden.grad_bias = nullptr;
  others.grad_hidden = nullptr;
  Backward<Kind>(hidden, threads).run();
  Backward<Kind>(others, threads).run();
}

template <class Kind>
void backward(const LogprobBackwardArgs& args, int threads) {
  if (args.means) {
    backward_from_means<Kind>(args, threads);
  } else {
    backward_in_walks<Kind>(args, threads);
  }
}

}  // namespace

void linear_logprob_fwd(const LogprobForwardArgs& args, int threads) {
  threads = worth_waking(args.linear, threads);
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return Forward<Pairs>(args, threads).run();
  }
#endif
  Forward<Floats>(args, threads).run();
}

void linear_logprob_bwd(const LogprobBackwardArgs& args, int threads) {
  threads = worth_waking(args.linear, threads);
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return backward<Pairs>(args, threads);
  }
#endif
  backward<Floats>(args, threads);
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

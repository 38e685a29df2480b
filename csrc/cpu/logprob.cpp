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
// logprob_backward.h is the way back.
#include "logprob.h"

#include "logprob_backward.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

template <class Kind>
void forward(const LogprobForwardArgs& args, int threads) {
  const LinearArgs& a = args.linear;
  const int64_t capacity = tokens_at_once<Kind>(a);
  const int64_t chunk = chunk_rows(a.vocab), chunks = ceil_div(a.vocab, chunk);
  const int64_t panels = ceil_div(capacity, kPanel);
  const Plan plan = make_plan<Kind>(a, args.workspace);
  Tokens<Kind> tokens(a, capacity);
  Buffer<Running> running(chunks * panels);
  Buffer<float> at_target(panels * kPanel), inv_temperature(panels * kPanel);

  for (int64_t first = 0; first < a.rows; first += capacity) {
    tokens.pack(first, std::min(capacity, a.rows - first), threads);
    std::fill_n(inv_temperature.get(), panels * kPanel, 0.0f);
    for (int64_t t = 0; t < tokens.count(); ++t) {
      inv_temperature[t] = a.inv_temperature[a.row(first + t)];
    }
    // Which tokens a task takes changes who computes, not what.
    const int64_t groups = std::min(tokens.panels(), ceil_div(4 * threads, chunks));
    const int64_t per_group = ceil_div(tokens.panels(), groups);
    parallel_for(chunks * groups, threads, [&](int64_t task) {
      const int64_t c = task / groups, p0 = task % groups * per_group;
      const int64_t p1 = std::min(p0 + per_group, tokens.panels());
      Buffer<float> z(kBlock * kPanel), scratch(kBlock * a.width);
      const int64_t end = std::min((c + 1) * chunk, a.vocab);
      for (int64_t v0 = c * chunk; v0 < end; v0 += kBlock) {
        const int n = static_cast<int>(std::min<int64_t>(kBlock, end - v0));
        const Rows rows = tokens.weight_rows(v0, n, scratch.get());
        for (int64_t p = p0; p < p1; ++p) {
          tokens.logits(rows, v0, n, p, z.get());
          fold(z.get(), n, tokens.vectors(p), inv_temperature.get() + p * kPanel, v0 == c * chunk,
               running[c * panels + p],
               plan.kept_block<Kind>(args.workspace.kept, v0, first / kPanel + p));
          for (int64_t i = 0; i < tokens.in_panel(p); ++i) {
            const int64_t t = p * kPanel + i, v = a.target[a.row(first + t)] - v0;
            if (v >= 0 && v < n) {
              at_target[t] = z[v * kPanel + i] * inv_temperature[t];
            }
          }
        }
      }
    });
    parallel_for(tokens.panels(), threads, [&](int64_t p) {
      for (int64_t i = 0; i < tokens.in_panel(p); ++i) {
        const Merged all = merge(running.get() + p, chunks, panels, i);
        const int64_t t = p * kPanel + i, row = a.row(first + t);
        args.lse[row] = all.max + all.log_sum;
        args.logprob[row] = at_target[t] - all.max - all.log_sum;
        args.entropy[row] = all.log_sum - all.weighted / all.sum;
      }
    });
  }
}

}  // namespace

void linear_logprob_fwd(const LogprobForwardArgs& args, int threads) {
  threads = worth_waking(args.linear, threads);
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return forward<Pairs>(args, threads);
  }
#endif
  forward<Floats>(args, threads);
}

void linear_logprob_bwd(const LogprobBackwardArgs& args, int threads) {
  threads = worth_waking(args.linear, threads);
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return Backward<Pairs>(args, threads).run();
  }
#endif
  Backward<Floats>(args, threads).run();
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

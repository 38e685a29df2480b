// The lm-head's log-probs where hidden's gradient alone is wanted: the forward sums the means of
// the weight's rows beside its statistics, two products where a backward of its own makes it three.
// In the namespace of the instruction set.
//
// The exponentials are taken relative to the target's logit, which is known before the vocabulary
// is walked, so nothing that has been summed changes its scale. Each of them is at most 1 / p of
// the target; a target less likely than e^kUnlikely is left to the backward that computes all again
// (logprob_backward.h), as are tokens with a gradient of the entropy.
#pragma once

#include <vector>

#include "logprob_backward.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kTogetherBytes = 24 << 20;  // of chunks taken together
constexpr float kUnlikely = -60.0f;
constexpr float kNegligible = -80.0f;  // below it an exponential's products may be subnormal
constexpr float kHighest = 80.0f;      // only tokens that are computed again have more

// The weight's row of a target, as floats.
inline void target_row(const LinearArgs& a, int64_t row, float* weight) {
  const int64_t at = a.target[row] * a.weight_stride * bytes(a.weight_type);
  to_floats(static_cast<const char*>(a.weight) + at, a.weight_type, a.width, weight);
}

// And its logit before the temperature; `hidden` is room for as many floats.
inline float target_logit(const LinearArgs& a, int64_t row, const float* weight, float* hidden) {
  const int64_t at = row * a.width * bytes(a.hidden_type);
  to_floats(static_cast<const char*>(a.hidden) + at, a.hidden_type, a.width, hidden);
  Vec sums = {};
  int64_t h = 0;
  for (; h + kLanes <= a.width; h += kLanes) {
    sums = fma(load(hidden + h), load(weight + h), sums);
  }
  alignas(64) float z[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    z[0] += sums[i];
  }
  for (; h < a.width; ++h) {
    z[0] += hidden[h] * weight[h];
  }
  to_logits(a, a.target[row], 1, 1, z);
  return z[0];
}

template <class Kind>
class Means {
 public:
  Means(const LogprobForwardArgs& args, const Tokens<Kind>& tokens, int64_t capacity, int64_t chunk,
        int threads)
      : args_(args),
        a_(args.linear),
        tokens_(tokens),
        chunk_(chunk),
        threads_(threads),
        few_(Kind::kStep == 1 && a_.rows <= kFew && a_.rows <= capacity &&
             enough_chunks(a_, ceil_div(a_.vocab, chunk), true, threads)),
        // With little to do for each, several: threads that share a chunk share its tokens.
        together_(std::min(std::max(ceil_div(2 * threads, ceil_div(capacity, kPanel)),
                                    kTogetherBytes / WeightSums<Kind>::size(
                                                         a_, round_up(capacity, kPanel), chunk)),
                           ceil_div(a_.vocab, chunk))),
        weight_sums_(a_, round_up(capacity, kPanel), chunk, few_ ? 0 : together_),
        reference_(round_up(capacity, kPanel)) {}

  // Whether a thread takes whole chunks, each with all tokens.
  bool few() const { return few_; }
  // Chunks at a time.
  int64_t together() const { return together_; }

  // Sums of 0 for the tokens taken, and their targets' logits: how they are rounded is all the
  // same.
  void start() const {
    parallel_for(tokens_.panels(), threads_, [&](int64_t p) {
      Buffer<float> hidden(a_.width), weight(a_.width);
      std::fill_n(reference_.get() + p * kPanel, kPanel, 0.0f);
      for (int64_t t = p * kPanel; t < p * kPanel + tokens_.in_panel(p); ++t) {
        const int64_t row = a_.row(tokens_.first() + t);
        target_row(a_, row, weight.get());
        reference_[t] = target_logit(a_, row, weight.get(), hidden.get()) * a_.inv_temperature[row];
        std::fill_n(sums(t), a_.width, 0.0f);
      }
    });
  }

  // A block of logits, of panel p, becomes its exponentials.
  void exponentiate(int64_t v0, int n, int64_t p, const float* inv_temperature, float* z) const {
    for (int at = 0; at < tokens_.vectors(p) * kLanes; at += kLanes) {
      const Vec scale = load(inv_temperature + at),
                reference = load(reference_.get() + p * kPanel + at);
      for (int r = 0; r < n; ++r) {
        float* to = z + r * kPanel + at;
        const Vec logit = load(to), x = at_least(fma(logit, scale, -reference), splat(kLowest));
        Vec e = exp_from_lowest(at_most(x, splat(kHighest)));
        e = select(x > splat(kNegligible), e, e * 0.0f);
        if (a_.softcap > 0.0f) {
          e = e * (1.0f - (logit / a_.softcap) * (logit / a_.softcap));
        }
        store(to, e);
      }
    }
    for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
      const int64_t v = a_.target[a_.row(tokens_.first() + p * kPanel + i)] - v0;
      if (v >= 0 && v < n) {
        z[v * kPanel + i] = 0.0f;
      }
    }
  }

  // Exponentials of n rows from row v0 on, which is row `at` of the chunk that is c of those
  // together.
  void keep(int64_t c, int64_t v0, int64_t at, int n, int64_t p, float* e) const {
    const int64_t tokens = tokens_.in_panel(p);
    if (p == 0) {
      weight_sums_.pack(c, v0 - at, at, n);
    }
    if constexpr (Kind::kStep == 1) {
      weight_sums_.keep(c, at, n, p, tokens, e);
    } else {
      alignas(64) uint16_t halves[kBlock * kPanel];
      const Halves rounded = {halves, kPanel, 16 * kPanel};
      round_rows<Kind>(e, n, tokens, rounded);
      weight_sums_.keep(c, at, n, p, tokens, rounded);
    }
  }

  // What the chunks from c0 on, of which all is kept, add to the sums.
  void add_chunks(int64_t c0, int64_t count) const {
    const int64_t rows = std::min(count * chunk_, a_.vocab - c0 * chunk_);
    weight_sums_.add_products(rows, tokens_.count(), threads_, [&](int64_t t) { return sums(t); });
  }

  // The same of all chunks, with few tokens: walk(c, take) computes chunk c and calls take(at, n,
  // p, e) with the exponentials of n rows from row `at` on, of one panel after another.
  template <class Walk>
  void add_chunks_of_few(Walk walk) const {
    const FewTokens operands = {a_.rows,
                                a_.width,
                                nullptr,
                                static_cast<const char*>(a_.weight),
                                a_.weight_stride * bytes(a_.weight_type),
                                a_.weight_type,
                                nullptr};
    const auto one = [&](int64_t c, float* all) {
      const int64_t size = a_.rows * round_up(a_.width, kPanel);
      Buffer<float> g(kBlock * a_.rows), of_steps(size);
      std::fill_n(of_steps.get(), size, 0.0f);
      walk(c, [&](int64_t at, int n, int64_t p, const float* e) {
        tile_gradients(e, n, tokens_.in_panel(p), a_.rows, g.get() + p * kPanel * kTile);
        if (p + 1 == tokens_.panels()) {
          multiply_both<false, true>(operands, g.get(), c * chunk_ + at, n, at, rows_of(c),
                                     {of_steps.get(), all});
        }
      });
    };
    sum_chunks(a_, ceil_div(a_.vocab, chunk_), threads_, one, [&](int64_t t) { return sums(t); });
  }

  // The sums of token t become means.
  void finish(int64_t t, float lse) const {
    const float factor = std::exp(reference_[t] - lse);
    float* sum = sums(t);
    for (int64_t h = 0; h < a_.width; ++h) {
      sum[h] *= factor;
    }
  }

 private:
  float* sums(int64_t t) const { return args_.means + a_.row(tokens_.first() + t) * a_.width; }
  int64_t rows_of(int64_t c) const { return std::min(chunk_, a_.vocab - c * chunk_); }

  const LogprobForwardArgs& args_;
  const LinearArgs& a_;
  const Tokens<Kind>& tokens_;
  const int64_t chunk_;
  const int threads_;
  const bool few_;
  const int64_t together_;
  WeightSums<Kind> weight_sums_;
  Buffer<float> reference_;
};

// hidden's gradient of one row, from its means.
inline void from_means(const LogprobBackwardArgs& args, int64_t row, float* weight, float* grad) {
  const LinearArgs& a = args.linear;
  const float logprob = args.logprob[row], scale = a.inv_temperature[row] * a.logit_scale;
  const float grad_logprob = args.grad_logprob[row], grad_lse = args.grad_lse[row];
  const float of_p = (grad_lse - grad_logprob) * scale;
  float at_target = (std::exp(logprob) * grad_lse - grad_logprob * std::expm1(logprob)) * scale;
  target_row(a, row, weight);
  if (a.softcap > 0.0f) {
    const float capped = target_logit(a, row, weight, grad) / a.softcap;
    at_target *= 1.0f - capped * capped;
  }
  const float* means = args.means + row * a.width;
  for (int64_t h = 0; h < a.width; ++h) {
    grad[h] = of_p * means[h] + at_target * weight[h];
  }
  from_floats(grad, a.hidden_type, a.width,
              static_cast<char*>(args.grad_hidden) + row * a.width * bytes(a.hidden_type));
}

// The backward with means: grad_hidden, nothing else.
template <class Kind>
void backward_from_means(const LogprobBackwardArgs& args, int threads) {
  const LinearArgs& a = args.linear;
  std::vector<int64_t> rows, others;
  for (int64_t t = 0; t < a.rows; ++t) {
    const int64_t row = a.row(t);
    const bool likely = args.logprob[row] >= kUnlikely && args.grad_entropy[row] == 0.0f;
    (likely ? rows : others).push_back(row);
  }
  constexpr int64_t kAtOnce = 16;
  const auto count = static_cast<int64_t>(rows.size());
  parallel_for(ceil_div(count, kAtOnce), threads, [&](int64_t task) {
    Buffer<float> weight(a.width), grad(a.width);
    for (int64_t i = task * kAtOnce; i < std::min((task + 1) * kAtOnce, count); ++i) {
      from_means(args, rows[i], weight.get(), grad.get());
    }
  });
  if (!others.empty()) {
    LogprobBackwardArgs again = args;
    again.linear.index = others.data();
    again.linear.rows = static_cast<int64_t>(others.size());
    Backward<Kind>(again, threads).run();
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// The backward of the lm-head's log-probs on a CPU, in the namespace of the instruction set.
//
// It walks the vocabulary once: the exponentials of a chunk of logits are computed again, or taken
// from where the forward kept them, and turned into the logits' gradients G, from which the chunk's
// rows of grad_weight = G hidden are finished, and grad_hidden += G^T weight grows. Nothing of size
// [N, V] or, beyond the gradients, [V, H] exists.
//
// With few tokens a thread takes a chunk of the vocabulary from its logits' gradients to its part
// of grad_hidden, in one pass over the weight: few_backward.h. With more, each step is shared.
//
// The float sums of a 16-bit grad_hidden may be more than the workspace allows. Then grad_hidden
// has a walk of its own, some tokens at a time: five products in place of four.
#pragma once

#include "logprob_plan.h"
#include "pages.h"
#include "weight_rows.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kBlocks = 2;      // of the vocabulary that a thread takes together
constexpr float kNothing = 1e-37f;  // probabilities below it count as 0, lest subnormals appear

// What a token contributes to the gradient of its logits; all 0 in lanes without a token.
struct Upstream {
  float lse[kPanel], entropy[kPanel], inv_temperature[kPanel];
  float of_p[kPanel];       // times p: grad_lse - grad_logprob
  float of_spread[kPanel];  // times -p (log p + entropy): grad_entropy
  float at_target[kPanel];  // the target's own gradient, exact where its p is near 1
  int64_t target[kPanel];
  bool spread;  // any of_spread
};

template <class Kind>
class Backward {
 public:
  using Element = typename Kind::Element;

  Backward(const LogprobBackwardArgs& args, int threads)
      : args_(args),
        a_(args.linear),
        threads_(threads),
        plan_(make_plan<Kind>(a_, args.workspace)),
        by_row_{plan_.g_stride / Kind::kStep},
        want_weight_(args.grad_weight || args.grad_bias),
        several_(a_.rows > plan_.capacity),
        few_(plan_.few &&
             enough_chunks(a_, ceil_div(a_.vocab, plan_.chunk), args.grad_hidden, threads)),
        tokens_(a_, plan_.capacity),
        upstream_(plan_.padded / kPanel),
        hidden_(args.grad_weight ? plan_.padded / Kind::kStep * plan_.columns : 0),
        rows_at_once_(args.grad_hidden ? plan_.together * plan_.chunk : plan_.rows_alone),
        weight_sums_(a_, plan_.padded, plan_.chunk, args.grad_hidden && !few_ ? plan_.together : 0),
        grad_weight_(args.grad_weight && a_.rows > plan_.range ? rows_at_once_ * plan_.columns : 0),
        sums_(args.grad_hidden && a_.hidden_type != Float::f32
                  ? round_up(want_weight_ || few_ ? a_.rows : plan_.capacity, kLanes) *
                        plan_.columns
                  : 0) {}

  void run() {
    if constexpr (Kind::kStep == 1) {
      if (few_) {
        return walk_few();
      }
    }
    if (want_weight_) {
      walk_vocabulary(args_.grad_hidden);
    } else if (args_.grad_hidden) {
      walk_tokens();
    }
  }

 private:
  // grad_weight, grad_bias and, if asked, grad_hidden.
  void walk_vocabulary(bool hidden) {
    if (hidden) {
      start_sums(0, a_.rows);
    }
    for (int64_t v0 = 0; v0 < a_.vocab; v0 += rows_at_once_) {
      for (int64_t first = 0; first < a_.rows; first += plan_.capacity) {
        if (several_ || v0 == 0) {
          take_tokens(first);
        }
        chunks(v0, true, hidden, first == 0);
      }
    }
    if (hidden) {
      finish_sums(0, a_.rows);
    }
  }

  // All gradients, of few tokens: a thread takes a whole chunk.
  void walk_few() {
    take_tokens(0);
    start_sums(0, args_.grad_hidden ? a_.rows : 0);
    const int64_t chunks = ceil_div(a_.vocab, plan_.chunk);
    if (args_.grad_hidden) {
      sum_chunks(
          a_, chunks, threads_, [&](int64_t c, float* all) { chunk_of_few(c, all); },
          [&](int64_t t) { return sums(t); });
    } else {
      parallel_for(chunks, threads_, [&](int64_t c) { chunk_of_few(c, nullptr); });
    }
    finish_sums(0, args_.grad_hidden ? a_.rows : 0);
  }

  void chunk_of_few(int64_t c, float* all) const {
    const int64_t first = c * plan_.chunk, rows = std::min(plan_.chunk, a_.vocab - first);
    Buffer<float> z(kBlock * kPanel), scratch(tokens_.scratch()), g(kBlock * a_.rows);
    Buffer<float> sums(args_.grad_hidden ? a_.rows * plan_.columns : 0);
    std::fill_n(sums.get(), args_.grad_hidden ? a_.rows * plan_.columns : 0, 0.0f);
    const auto* weight = static_cast<const char*>(a_.weight);
    const int64_t stride = a_.weight_stride * bytes(a_.weight_type);
    const FewTokens operands = {a_.rows,
                                a_.width,
                                hidden_.get(),
                                weight,
                                stride,
                                a_.weight_type,
                                static_cast<char*>(args_.grad_weight)};
    const auto multiply =
        args_.grad_weight
            ? (args_.grad_hidden ? multiply_both<true, true> : multiply_both<true, false>)
            : multiply_both<false, true>;
    for (int64_t at = 0; at < rows; at += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, rows - at));
      differentiate(first + at, n, 0, args_.grad_bias, z.get(), scratch.get(),
                    [&](int64_t, int, int64_t p, float* z) {
                      tile_gradients(z, n, tokens_.in_panel(p), a_.rows,
                                     g.get() + p * kPanel * kTile);
                    });
      make_rows(first + at, n);
      if (args_.grad_weight || args_.grad_hidden) {
        multiply(operands, g.get(), first + at, n, at, rows, {sums.get(), all});
      }
    }
  }

  // grad_hidden alone.
  void walk_tokens() {
    for (int64_t first = 0; first < a_.rows; first += plan_.capacity) {
      take_tokens(first);
      start_sums(first, tokens_.count());
      for (int64_t v0 = 0; v0 < a_.vocab; v0 += rows_at_once_) {
        chunks(v0, false, true, true);
      }
      finish_sums(first, tokens_.count());
    }
  }

  // Where the float sums of token t's gradient are, t counted from the tokens taken.
  float* sums(int64_t t) const {
    const int64_t token = tokens_.first() + t;
    if (a_.hidden_type == Float::f32) {
      return static_cast<float*>(args_.grad_hidden) + a_.row(token) * a_.width;
    }
    return sums_.get() + (want_weight_ ? token : t) * a_.width;
  }

  // The same for tiles.
  PanelSums panel_sums(int64_t t) const {
    const int64_t token = want_weight_ ? tokens_.first() + t : t;
    return {sums_.get() + token * kPanel,
            round_up(want_weight_ ? a_.rows : plan_.capacity, kLanes)};
  }

  void start_sums(int64_t first, int64_t count) const {
    if (Made<Kind>::kTiles) {
      const PanelSums sums = panel_sums(first - tokens_.first());
      return parallel_for(plan_.columns / kPanel, threads_, [&](int64_t p) {
        std::fill_n(sums.at(p * kPanel, 0), count * kPanel, 0.0f);
      });
    }
    parallel_for(count, threads_, [&](int64_t t) {
      std::fill_n(sums(first - tokens_.first() + t), a_.width, 0.0f);
    });
  }

  void finish_sums(int64_t first, int64_t count) const {
    if (a_.hidden_type == Float::f32) {
      return;
    }
    const int64_t size = bytes(a_.hidden_type);
    parallel_for(count, threads_, [&](int64_t t) {
      char* to = static_cast<char*>(args_.grad_hidden) + a_.row(first + t) * a_.width * size;
      const int64_t taken = first - tokens_.first() + t;
      if (!Made<Kind>::kTiles) {
        return from_floats(sums(taken), a_.hidden_type, a_.width, to);
      }
      for (int64_t h = 0; h < a_.width; h += kPanel) {
        from_floats(panel_sums(taken).at(h, 0), a_.hidden_type,
                    std::min<int64_t>(kPanel, a_.width - h), to + h * size);
      }
    });
  }

  void take_tokens(int64_t first) {
    tokens_.pack(first, std::min(plan_.capacity, a_.rows - first), threads_);
    parallel_for(tokens_.panels(), threads_, [&](int64_t p) {
      Upstream& u = upstream_[p];
      std::memset(&u, 0, sizeof u);
      for (int64_t i = 0; i < kPanel; ++i) {
        u.target[i] = -1;
        if (i < tokens_.in_panel(p)) {
          take_token(a_.row(first + p * kPanel + i), i, u);
        }
      }
      if (args_.grad_weight && few_) {
        for (int64_t i = p * kPanel; i < p * kPanel + tokens_.in_panel(p); ++i) {
          const int64_t at = a_.row(i) * a_.width * bytes(a_.hidden_type);
          pack_token(static_cast<const char*>(a_.hidden) + at, a_.hidden_type, a_.width, a_.rows,
                     reinterpret_cast<float*>(hidden_.get()) + i * kAcross);
        }
      } else if (args_.grad_weight) {
        pack_hidden(first, p);
      }
    });
  }

  // A panel of the tokens taken, from token `first` on, for grad_weight's product.
  void pack_hidden(int64_t first, int64_t p) const {
    const auto* hidden = static_cast<const char*>(a_.hidden);
    const int64_t skipped = a_.index ? 0 : first * a_.width * bytes(a_.hidden_type);
    const int64_t t0 = p * kPanel, t1 = t0 + tokens_.in_panel(p), depth = depth_of_tokens();
    pack_rows(Kind(), hidden + skipped, a_.width, a_.hidden_type, t0, t1 - t0, a_.width, depth,
              hidden_.get(), a_.index ? a_.index + first : nullptr);
    const int64_t packed = round_up(t1, Kind::kStep), end = std::min(t0 + kPanel, depth);
    for (int64_t h = 0; h < a_.width; h += kPanel) {
      std::fill_n(hidden_.get() + (h * depth + packed * kPanel) / Kind::kStep,
                  (end - packed) * kPanel / Kind::kStep, Element());
    }
  }

  void take_token(int64_t row, int64_t i, Upstream& u) const {
    const float logprob = args_.logprob[row], entropy = args_.entropy[row];
    const float grad_logprob = args_.grad_logprob[row], grad_lse = args_.grad_lse[row];
    const float spread = args_.grad_entropy[row] * (logprob + entropy);
    u.lse[i] = args_.lse[row];
    u.entropy[i] = entropy;
    u.inv_temperature[i] = a_.inv_temperature[row];
    u.of_p[i] = grad_lse - grad_logprob;
    u.of_spread[i] = args_.grad_entropy[row];
    u.at_target[i] =
        (std::exp(logprob) * (grad_lse - spread) - grad_logprob * std::expm1(logprob)) *
        u.inv_temperature[i] * a_.logit_scale;
    u.target[i] = a_.target[row];
    u.spread = u.spread || u.of_spread[i] != 0.0f;
  }

  int64_t depth_of_tokens() const { return round_up(tokens_.count(), kDepthOfTokens<Kind>); }

  int64_t tokens_in_range(int64_t t0) const { return std::min(plan_.range, tokens_.count() - t0); }

  // Some chunks of the vocabulary, from row `first` on, and the tokens taken.
  void chunks(int64_t first, bool weight, bool hidden, bool pack_weight) {
    const int64_t rows = std::min(rows_at_once_, a_.vocab - first);
    const int64_t blocks = ceil_div(rows, kBlock);
    const int64_t most = Made<Kind>::kTiles ? kBlocks : 1;
    const int64_t each = std::clamp<int64_t>(blocks / (4 * threads_), 1, most);
    parallel_for(ceil_div(blocks, each), threads_, [&](int64_t task) {
      const int64_t begin = task * each * kBlock, end = std::min(begin + each * kBlock, rows);
      const int64_t size = kBlock * plan_.g_stride / Kind::kStep;
      Buffer<float> z(2 * each * kBlock * kPanel), scratch(each * tokens_.scratch());
      Buffer<Element> by_row(each * size);
      for (int64_t t = 0; t < tokens_.count(); t += plan_.range) {
        differentiate(first + begin, end - begin, t, weight && args_.grad_bias, z.get(),
                      scratch.get(), [&](int64_t b, int n, int64_t p, float* g) {
                        const int64_t at = begin + b * kBlock;
                        keep(at / plan_.chunk, at % plan_.chunk, n, p, t, g,
                             by_row.get() + b * size);
                      });
        if (weight && args_.grad_weight) {
          add_grad_weight(first + begin, begin, end - begin, t, by_row.get(), z.get());
        }
      }
      for (int64_t at = begin; hidden && pack_weight && at < end; at += kBlock) {
        const int64_t c = at / plan_.chunk, in_chunk = at % plan_.chunk;
        weight_sums_.pack(c, first + at - in_chunk, in_chunk, rows_in_block(at, end));
      }
    });
    if (hidden) {
      if constexpr (Made<Kind>::kTiles) {
        weight_sums_.add_products(rows, tokens_.count(), threads_, panel_sums(0));
      } else {
        weight_sums_.add_products(rows, tokens_.count(), threads_,
                                  [&](int64_t t) { return sums(t); });
      }
    }
  }

  static int rows_in_block(int64_t at, int64_t end) {
    return static_cast<int>(std::min<int64_t>(kBlock, end - at));
  }

  // Blocks of vocabulary rows, and the range of tokens from t0 on: the gradients of a block's
  // logits, before scale and bias, are left in z and taken from there, a panel of tokens at a time:
  // take(block, its rows, panel, its z).
  template <class Take>
  void differentiate(int64_t v0, int64_t count, int64_t t0, bool bias, float* z, float* scratch,
                     Take take) const {
    double sum[kBlocks * kBlock] = {};
    Rows blocks[kBlocks];
    bool have_rows = false;
    for (int64_t p = t0 / kPanel; p < ceil_div(t0 + tokens_in_range(t0), kPanel); ++p) {
      int64_t kept = 0;  // rows whose logits are not computed again
      while (kept < count && is_kept(v0 + kept, p)) {
        kept += kBlock;
      }
      if (kept < count) {
        for (int64_t r = 0; !have_rows && r < count; r += kBlock) {
          blocks[r / kBlock] = tokens_.weight_rows(v0 + r, rows_in_block(r, count),
                                                   scratch + r / kBlock * tokens_.scratch());
        }
        have_rows = true;
        tokens_.logits(blocks + kept / kBlock, v0 + kept, count - kept, p, z + kept * kPanel);
      }
      for (int64_t r = 0; r < count; r += kBlock) {
        const int n = rows_in_block(r, count);
        float* const g = z + r * kPanel;
        differentiate_block(v0 + r, n, p, r < kept, g);
        for (int i = 0; bias && i < n; ++i) {
          for (int64_t t = 0; t < tokens_.in_panel(p); ++t) {
            sum[r + i] += g[i * kPanel + t];
          }
        }
        take(r / kBlock, n, p, g);
      }
    }
    for (int64_t r = 0; bias && r < count; ++r) {
      float& to = args_.grad_bias[v0 + r];
      to = static_cast<float>(sum[r] + (tokens_.first() + t0 ? to : 0.0f));
    }
  }

  KeptBlock<Kind> kept_block(int64_t v0, int64_t p) const {
    return plan_.template kept_block<Kind>(args_.workspace.kept, v0, tokens_.first() / kPanel + p);
  }

  // Whether a block's exponentials are there, and enough.
  bool is_kept(int64_t v0, int64_t p) const {
    return !upstream_[p].spread && kept_block(v0, p).max != nullptr;
  }

  // One of them, with one panel: z has its logits, if they are not kept.
  void differentiate_block(int64_t v0, int n, int64_t p, bool is_kept, float* z) const {
    const Upstream& u = upstream_[p];
    const int vectors = tokens_.vectors(p);
    const auto kept = kept_block(v0, p);
    float before[kPanel] = {};  // the targets' logits, for the cap
    if (!is_kept) {
      for (int64_t i = 0; a_.softcap > 0.0f && i < tokens_.in_panel(p); ++i) {
        const int64_t v = u.target[i] - v0;
        before[i] = v >= 0 && v < n ? z[v * kPanel + i] : 0.0f;
      }
      for (int at = 0; at < vectors * kLanes; at += kLanes) {
        if (u.spread || plan_.exact) {
          differentiate_fully(u, n, at, z + at);
        } else {
          differentiate_lanes(
              u, n, at, highest_of(z + at, n, load(u.inv_temperature + at)),
              [&](int r, Vec scale, Vec highest) {
                return Kind::rounded(exp_from_lowest(below(z + r * kPanel + at, scale, highest)));
              },
              z + at);
        }
      }
    } else {
      for (int at = 0; at < vectors * kLanes; at += kLanes) {
        differentiate_lanes(
            u, n, at, load(kept.max + at),
            [&](int r, Vec, Vec) { return Kind::kept(kept.e + r * kept.lanes + at); }, z + at);
      }
    }
    for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
      const int64_t v = u.target[i] - v0;
      if (v >= 0 && v < n) {
        const float capped = a_.softcap > 0.0f ? before[i] / a_.softcap : 0.0f;
        z[v * kPanel + i] = u.at_target[i] * (1.0f - capped * capped);
      }
    }
  }

  Vec probability(Vec e, Vec factor) const {
    const Vec p = e * factor;
    return select(p > splat(kNothing), p, p * 0.0f);  // NaN stays
  }

  // A vector of tokens, from the exponentials relative to `highest`.
  template <class Exponential>
  void differentiate_lanes(const Upstream& u, int n, int at, Vec highest, Exponential exponential,
                           float* z) const {
    const Vec scale = load(u.inv_temperature + at);
    const Vec factor = exp_from_lowest(at_least(highest - load(u.lse + at), splat(kLowest)));
    const Vec of_p = load(u.of_p + at) * scale * a_.logit_scale;
    for (int r = 0; r < n; ++r) {
      store(z + r * kPanel, probability(exponential(r, scale, highest), factor) * of_p);
    }
  }

  // The same with gradients of the entropy and a cap.
  void differentiate_fully(const Upstream& u, int n, int at, float* z) const {
    const Vec scale = load(u.inv_temperature + at), highest = highest_of(z, n, scale);
    const Vec down = highest - load(u.lse + at);
    const Vec factor = exp_from_lowest(at_least(down, splat(kLowest)));
    for (int r = 0; r < n; ++r) {
      const Vec logit = load(z + r * kPanel), x = below(z + r * kPanel, scale, highest);
      const Vec e = exp_from_lowest(x);
      const Vec p = probability(plan_.exact ? e : Kind::rounded(e), factor);
      const Vec spread = load(u.of_spread + at) * (x + down + load(u.entropy + at));
      Vec g = p * ((load(u.of_p + at) - spread) * scale * a_.logit_scale);
      if (a_.softcap > 0.0f) {
        g = g * (1.0f - (logit / a_.softcap) * (logit / a_.softcap));
      }
      store(z + r * kPanel, g);
    }
  }

  // G of a block as the two products read it, by vocabulary row and by token; of the range of
  // tokens from t0 on.
  void keep(int64_t c, int64_t in_chunk, int n, int64_t p, int64_t t0, float* z,
            Element* of_row) const {
    const int64_t tokens = tokens_.in_panel(p), in_range = p * kPanel - t0;
    if constexpr (Kind::kStep == 1) {
      for (int r = 0; args_.grad_weight && r < n; ++r) {
        float* to = of_row + r * plan_.g_stride + in_range;
        std::memcpy(to, z + r * kPanel, tokens * sizeof(float));
      }
      if (args_.grad_hidden) {
        weight_sums_.keep(c, in_chunk, n, p, tokens, z);
      }
    } else {
      Element* first = of_row + by_row_.at(0, in_range / Kind::kStep);
      const Halves rounded = {reinterpret_cast<uint16_t*>(first),
                              (by_row_.at(1, 0) - by_row_.at(0, 0)) * Kind::kStep,
                              (by_row_.at(16, 0) - by_row_.at(0, 0)) * Kind::kStep};
      round_rows<Kind>(z, n, tokens, rounded);
      if (args_.grad_hidden) {
        weight_sums_.keep(c, in_chunk, n, p, tokens, rounded);
      }
    }
  }

  // The pages of n rows of grad_weight.
  void make_rows(int64_t v0, int64_t n) const {
    if (args_.grad_weight && !args_.workspace.in_gradient) {  // or they are there
      fastrl::make_rows(args_.grad_weight, a_.vocab, a_.width * bytes(a_.weight_type), v0, n);
    }
  }

  // Blocks of rows from v0 on, row `at` of those at once, and the range of tokens from t0 on.
  void add_grad_weight(int64_t v0, int64_t at, int64_t count, int64_t t0, const Element* by_row,
                       float* z) const {
    const int64_t size = kBlock * plan_.g_stride / Kind::kStep;
    Rows blocks[kBlocks];
    for (int64_t r = 0; r < count; r += kBlock) {
      blocks[r / kBlock] = by_row_.rows(by_row + r / kBlock * size, 0, rows_in_block(r, count));
    }
    const int64_t depth = depth_of_tokens(), tokens = tokens_in_range(t0);
    const int64_t steps = round_up(tokens, kDepthOfTokens<Kind>) / Kind::kStep;
    const bool last = tokens_.first() + t0 + tokens == a_.rows;
    make_rows(v0, last ? count : 0);
    const int64_t rows = round_up(count, kBlock);
    float* const all = grad_weight_.get() + at * plan_.columns;
    WeightRows written(a_, args_.grad_weight, v0);
    for (int64_t h = 0; h < a_.width; h += kPanel) {
      float* const sums = grad_weight_.get() ? all + h * rows : z + h / kPanel % 2 * rows * kPanel;
      const Element* panel = hidden_.get() + h * depth / Kind::kStep + t0 * kPanel / Kind::kStep;
      const bool onto = tokens_.first() + t0 > 0;
      multiply_blocks<Kind>(blocks, count, steps, panel, kVectors, sums, onto, written);
      written.finish();
      if (last) {
        written.start(sums, count, h, tile_steps(count, steps));
      }
    }
    written.finish();
  }

  const LogprobBackwardArgs& args_;
  const LinearArgs& a_;
  const int threads_;
  const Plan plan_;
  const Made<Kind> by_row_;  // G of a block
  const bool want_weight_;
  const bool several_;  // the tokens do not fit in one go
  const bool few_;      // they are so few that a thread takes a whole chunk
  Tokens<Kind> tokens_;
  Buffer<Upstream> upstream_;
  Buffer<Element> hidden_;
  const int64_t rows_at_once_;  // of the vocabulary
  WeightSums<Kind> weight_sums_;
  Buffer<float> grad_weight_, sums_;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

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
// The backward walks the vocabulary once: the logits of a chunk are computed again and turned into
// their gradients G, from which the chunk's rows of grad_weight = G hidden are finished, and
// grad_hidden += G^T weight grows. Nothing of size [N, V] or, beyond the gradients, [V, H] exists.
#include "logprob.h"

#include "running.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kBackwardRows = 768;  // of the vocabulary, taken together in the backward

template <class Kind>
void forward(const LogprobForwardArgs& args, int threads) {
  const LinearArgs& a = args.linear;
  const int64_t capacity = tokens_at_once(a);
  const int64_t chunk = chunk_rows(a.vocab), chunks = ceil_div(a.vocab, chunk);
  const int64_t panels = ceil_div(capacity, kPanel);
  Tokens<Kind> tokens(a, capacity);
  Buffer<Running> running(chunks * panels);
  Buffer<float> at_target(panels * kPanel), inv_temperature(panels * kPanel);

  for (int64_t first = 0; first < a.rows; first += capacity) {
    tokens.pack(first, std::min(capacity, a.rows - first), threads);
    std::fill_n(inv_temperature.get(), panels * kPanel, 0.0f);
    std::copy_n(a.inv_temperature + first, tokens.count(), inv_temperature.get());
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
               running[c * panels + p]);
          for (int64_t i = 0; i < tokens.in_panel(p); ++i) {
            const int64_t t = p * kPanel + i, v = a.target[first + t] - v0;
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
        const int64_t t = p * kPanel + i;
        args.lse[first + t] = all.max + all.log_sum;
        args.logprob[first + t] = at_target[t] - all.max - all.log_sum;
        args.entropy[first + t] = all.log_sum - all.weighted / all.sum;
      }
    });
  }
}

// What a token contributes to the gradient of its logits; all 0 in lanes without a token.
struct Upstream {
  float lse[kPanel], entropy[kPanel], inv_temperature[kPanel];
  float of_p[kPanel];       // grad_lse - grad_logprob: times p
  float of_spread[kPanel];  // grad_entropy: times -p (log p + entropy)
  float of_target[kPanel];  // grad_logprob: at the target
  int64_t target[kPanel];
};

// bf16 numbers as the lower or upper halves of the lanes.
inline Vec with_bf16(Vec lanes, const uint16_t (&halves)[kLanes], int upper) {
  uint32_t bits[kLanes];
  std::memcpy(bits, &lanes, sizeof bits);
  for (int i = 0; i < kLanes; ++i) {
    bits[i] |= static_cast<uint32_t>(halves[i]) << (16 * upper);
  }
  std::memcpy(&lanes, bits, sizeof bits);
  return lanes;
}

template <class Kind>
class Backward {
 public:
  using Element = typename Kind::Element;

  Backward(const LogprobBackwardArgs& args, int threads)
      : args_(args),
        a_(args.linear),
        threads_(threads),
        capacity_(tokens_at_once(a_)),
        padded_(round_up(capacity_, kPanel)),
        columns_(round_up(a_.width, kPanel)),
        chunk_(std::min(kBackwardRows, round_up(a_.vocab, kBlock))),
        several_(a_.rows > capacity_),
        tokens_(a_, capacity_),
        upstream_(padded_ / kPanel),
        by_row_(chunk_ * padded_ / Kind::kStep),
        by_token_(Kind::kStep == 1 ? 0 : chunk_ / Kind::kStep * padded_),
        hidden_(args.grad_weight ? padded_ / Kind::kStep * columns_ : 0),
        weight_(args.grad_hidden ? chunk_ / Kind::kStep * columns_ : 0),
        grad_weight_(args.grad_weight && several_ ? chunk_ * a_.width : 0),
        grad_hidden_(own_grad_hidden() ? a_.rows * a_.width : 0) {}

  void run() {
    float* grad_hidden =
        own_grad_hidden() ? grad_hidden_.get() : static_cast<float*>(args_.grad_hidden);
    if (grad_hidden) {
      parallel_for(a_.rows, threads_,
                   [&](int64_t t) { std::fill_n(grad_hidden + t * a_.width, a_.width, 0.0f); });
    }
    for (int64_t v0 = 0; v0 < a_.vocab; v0 += chunk_) {
      const int64_t rows = std::min(chunk_, a_.vocab - v0);
      for (int64_t first = 0; first < a_.rows; first += capacity_) {
        if (several_ || v0 == 0) {
          take_tokens(first);
        }
        parallel_for(ceil_div(rows, kBlock), threads_, [&](int64_t b) { block(v0, b, rows); });
        if (grad_hidden) {
          const int64_t blocks = ceil_div(tokens_.count(), kBlock);
          parallel_for(blocks, threads_, [&](int64_t b) {
            add_grad_hidden(b, rows, grad_hidden + first * a_.width);
          });
        }
      }
    }
    if (own_grad_hidden()) {
      parallel_for(a_.rows, threads_, [&](int64_t t) {
        from_floats(grad_hidden + t * a_.width, a_.hidden_type, a_.width,
                    static_cast<char*>(args_.grad_hidden) + t * a_.width * bytes(a_.hidden_type));
      });
    }
  }

 private:
  bool own_grad_hidden() const { return args_.grad_hidden && a_.hidden_type != Float::f32; }

  void take_tokens(int64_t first) {
    tokens_.pack(first, std::min(capacity_, a_.rows - first), threads_);
    parallel_for(tokens_.panels(), threads_, [&](int64_t p) {
      Upstream& u = upstream_[p];
      std::memset(&u, 0, sizeof u);
      for (int64_t i = 0; i < kPanel; ++i) {
        u.target[i] = -1;
        if (i < tokens_.in_panel(p)) {
          const int64_t t = first + p * kPanel + i;
          u.lse[i] = args_.lse[t];
          u.entropy[i] = args_.entropy[t];
          u.inv_temperature[i] = a_.inv_temperature[t];
          u.of_p[i] = args_.grad_lse[t] - args_.grad_logprob[t];
          u.of_spread[i] = args_.grad_entropy[t];
          u.of_target[i] = args_.grad_logprob[t];
          u.target[i] = a_.target[t];
        }
      }
      if (args_.grad_weight) {
        const auto* hidden =
            static_cast<const char*>(a_.hidden) + first * a_.width * bytes(a_.hidden_type);
        const int64_t n = tokens_.in_panel(p), depth = depth_of_tokens();
        pack_rows(Kind(), hidden, a_.width, a_.hidden_type, p * kPanel, n, a_.width, depth,
                  hidden_.get());
      }
    });
  }

  int64_t depth_of_tokens() const { return round_up(tokens_.count(), Kind::kStep); }

  // One block of vocabulary rows: their logits' gradients G, packed weight, and grad_weight.
  void block(int64_t chunk_first, int64_t b, int64_t rows_of_chunk) {
    const int64_t in_chunk = b * kBlock, v0 = chunk_first + in_chunk;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, rows_of_chunk - in_chunk));
    Buffer<float> z(kBlock * kPanel), scratch(kBlock * a_.width);
    const Rows rows = tokens_.weight_rows(v0, n, scratch.get());
    double bias[kBlock] = {};  // a sum over all tokens
    for (int64_t p = 0; p < tokens_.panels(); ++p) {
      tokens_.logits(rows, v0, n, p, z.get());
      differentiate(v0, n, p, z.get(), bias);
      keep(in_chunk, n, p, z.get());
    }
    if (args_.grad_bias) {
      for (int r = 0; r < n; ++r) {
        args_.grad_bias[v0 + r] =
            static_cast<float>(bias[r] + (tokens_.first() ? args_.grad_bias[v0 + r] : 0.0f));
      }
    }
    if (args_.grad_hidden && tokens_.first() == 0) {
      const auto* weight = static_cast<const char*>(a_.weight) +
                           chunk_first * a_.weight_stride * bytes(a_.weight_type);
      pack_rows(Kind(), weight, a_.weight_stride, a_.weight_type, in_chunk, n, a_.width, chunk_,
                weight_.get());
    }
    if (args_.grad_weight) {
      add_grad_weight(v0, in_chunk, n, z.get());
    }
  }

  // z becomes the gradient of the logits before scale and bias.
  void differentiate(int64_t v0, int n, int64_t p, float* z, double* bias) const {
    const Upstream& u = upstream_[p];
    const int vectors = tokens_.vectors(p);
    float before[kPanel];
    for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
      const int64_t v = u.target[i] - v0;
      before[i] = v >= 0 && v < n ? z[v * kPanel + i] : 0.0f;
    }
    for (int r = 0; r < n; ++r) {
      for (int j = 0; j < vectors; ++j) {
        const int at = j * kLanes;
        const Vec x = load(z + r * kPanel + at), scale = load(u.inv_temperature + at);
        const Vec logp = at_least(fma(x, scale, -load(u.lse + at)), splat(kLowest));
        const Vec p = select(logp > splat(kLowest), exp_from_lowest(logp), logp * 0.0f);
        const Vec spread = load(u.of_spread + at) * (logp + load(u.entropy + at));
        Vec g = p * (load(u.of_p + at) - spread) * scale * a_.logit_scale;
        if (a_.softcap > 0.0f) {
          g = g * (1.0f - (x / a_.softcap) * (x / a_.softcap));
        }
        store(z + r * kPanel + at, g);
      }
    }
    for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
      const int64_t v = u.target[i] - v0;
      if (v >= 0 && v < n) {
        const float capped = a_.softcap > 0.0f ? before[i] / a_.softcap : 0.0f;
        z[v * kPanel + i] +=
            u.of_target[i] * u.inv_temperature[i] * a_.logit_scale * (1.0f - capped * capped);
      }
    }
    if (args_.grad_bias) {
      for (int r = 0; r < n; ++r) {
        for (int64_t i = 0; i < tokens_.in_panel(p); ++i) {
          bias[r] += z[r * kPanel + i];
        }
      }
    }
  }

  // G as the two products read it: by vocabulary row, and (for pairs) by token.
  void keep(int64_t in_chunk, int n, int64_t p, const float* z) const {
    const int64_t tokens = tokens_.in_panel(p);
    if constexpr (Kind::kStep == 1) {
      for (int r = 0; r < n; ++r) {
        float* to = by_row_.get() + (in_chunk + r) * padded_ + p * kPanel;
        std::memcpy(to, z + r * kPanel, tokens * sizeof(float));
      }
      return;
    }
    auto* by_row = reinterpret_cast<uint16_t*>(by_row_.get()) + in_chunk * padded_ + p * kPanel;
    for (int r0 = 0; r0 < n; r0 += 2 * kLanes) {
      const int rows = std::min(n - r0, 2 * kLanes);
      for (int at = 0; at < tokens; at += kLanes) {
        Vec pairs[kLanes] = {};  // of neighbouring rows, a token per lane
        for (int r = 0; r < rows; ++r) {
          uint16_t rounded[kLanes] = {};
          const int64_t count = std::min<int64_t>(kLanes, tokens - at);
          from_floats(z + (r0 + r) * kPanel + at, Float::bf16, count, rounded);
          std::memcpy(by_row + (r0 + r) * padded_ + at, rounded, sizeof rounded);
          pairs[r / 2] = with_bf16(pairs[r / 2], rounded, r % 2);
        }
        transpose(pairs);
        for (int i = 0; i < kLanes; ++i) {
          std::memcpy(by_token_.get() + ((p * kPanel + at + i) * chunk_ + in_chunk + r0) / 2,
                      &pairs[i], (rows + 1) / 2 * 4);
        }
      }
    }
  }

  void add_grad_weight(int64_t v0, int64_t in_chunk, int n, float* c) const {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(by_row_.get());
    rows.stride = sizeof(Element);
    for (int r = 0; r < kBlock; ++r) {
      rows.row[r] = (in_chunk + std::min(r, n - 1)) * padded_ * (4 / Kind::kStep);
    }
    const int64_t depth = depth_of_tokens();
    const bool last = tokens_.first() + tokens_.count() == a_.rows;
    for (int64_t h = 0; h < a_.width; h += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, a_.width - h);
      multiply<Kind>(rows, n, depth / Kind::kStep, hidden_.get() + h * depth / Kind::kStep,
                     kVectors, c);
      for (int r = 0; r < n; ++r) {
        float* sum = c + r * kPanel;
        if (several_) {
          float* kept = grad_weight_.get() + (in_chunk + r) * a_.width + h;
          for (int64_t i = 0; i < width; ++i) {
            sum[i] += tokens_.first() ? kept[i] : 0.0f;
          }
          std::memcpy(kept, sum, width * sizeof(float));
        }
        if (last) {
          const int64_t at = ((v0 + r) * a_.width + h) * bytes(a_.weight_type);
          from_floats(sum, a_.weight_type, width, static_cast<char*>(args_.grad_weight) + at);
        }
      }
    }
  }

  void add_grad_hidden(int64_t b, int64_t rows_of_chunk, float* grad_hidden) const {
    const int64_t t0 = b * kBlock;
    const int n = static_cast<int>(std::min<int64_t>(kBlock, tokens_.count() - t0));
    const void* gradients =
        Kind::kStep == 1 ? static_cast<const void*>(by_row_.get()) : by_token_.get();
    Rows rows;
    rows.data = static_cast<const char*>(gradients);
    rows.stride = Kind::kStep == 1 ? padded_ * 4 : 4;
    for (int r = 0; r < kBlock; ++r) {
      rows.row[r] = (t0 + std::min(r, n - 1)) * (Kind::kStep == 1 ? 4 : chunk_ * 2);
    }
    Buffer<float> c(kBlock * kPanel);
    for (int64_t h = 0; h < a_.width; h += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, a_.width - h);
      multiply<Kind>(rows, n, ceil_div(rows_of_chunk, Kind::kStep),
                     weight_.get() + h * chunk_ / Kind::kStep, kVectors, c.get());
      for (int r = 0; r < n; ++r) {
        float* to = grad_hidden + (t0 + r) * a_.width + h;
        for (int64_t i = 0; i < width; ++i) {
          to[i] += c[r * kPanel + i];
        }
      }
    }
  }

  const LogprobBackwardArgs& args_;
  const LinearArgs& a_;
  const int threads_;
  const int64_t capacity_, padded_, columns_, chunk_;
  const bool several_;  // the tokens do not fit in one go
  Tokens<Kind> tokens_;
  Buffer<Upstream> upstream_;
  Buffer<Element> by_row_;    // G [chunk, tokens]
  Buffer<Element> by_token_;  // pairs of neighbouring rows of G: [tokens, chunk / 2]
  Buffer<Element> hidden_, weight_;
  Buffer<float> grad_weight_, grad_hidden_;
};

}  // namespace

void linear_logprob_fwd(const LogprobForwardArgs& args, int threads) {
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return forward<Pairs>(args, threads);
  }
#endif
  forward<Floats>(args, threads);
}

void linear_logprob_bwd(const LogprobBackwardArgs& args, int threads) {
#ifdef FASTRL_PAIRS
  if (use_pairs(args.linear)) {
    return Backward<Pairs>(args, threads).run();
  }
#endif
  Backward<Floats>(args, threads).run();
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

#include "layers.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "pool.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kTaskFloats = 8192;  // of one tensor, so that a task's rows stay in L1 and L2
constexpr int64_t kTaskRows = 16;      // at least: each task has a partial sum of weight gradients

// n elements from `at` on as floats, padded with 0 to kSixteen: where they lie, or in `buffer`.
const float* read(const void* data, Float type, int64_t at, int64_t n, float* buffer) {
  if (type == Float::f32 && n % kSixteen == 0) {
    return static_cast<const float*>(data) + at;
  }
  to_floats(static_cast<const char*>(data) + at * bytes(type), type, n, buffer);
  std::fill(buffer + n, buffer + round_up(n, kSixteen), 0.0f);
  return buffer;
}

// Where to compute n elements that go to `at`, and how they get there.
class Sink {
 public:
  Sink(void* data, Float type, int64_t at, int64_t n, float* buffer)
      : to_(static_cast<char*>(data) + at * bytes(type)),
        type_(type),
        n_(n),
        direct_(type == Float::f32 && n % kSixteen == 0),
        floats_(direct_ ? reinterpret_cast<float*>(to_) : buffer) {}
  float* get() const { return floats_; }
  void done() const {
    if (!direct_) {
      from_floats(floats_, type_, n_, to_);
    }
  }

 private:
  char* to_;
  Float type_;
  int64_t n_;
  bool direct_;
  float* floats_;
};

// Tasks of so many rows, whatever the number of threads, so that sums over rows keep their order.
int64_t rows_of_task(int64_t width) { return std::max(kTaskRows, kTaskFloats / width); }

// Calls work(row, scratch, partial) for all rows. `partial` [width] begins at 0 for each task; with
// `total`, their sum over the tasks, in order.
template <class Work>
void for_rows(int64_t rows, int64_t row_width, int64_t scratch, float* total, int64_t width,
              int threads, const Work& work) {
  const int64_t each = rows_of_task(row_width), tasks = ceil_div(rows, each);
  Buffer<float> partials(total ? tasks * width : 0);
  parallel_for(tasks, threads, [&](int64_t task) {
    Buffer<float> buffer(scratch);
    float* partial = total ? partials.get() + task * width : nullptr;
    if (partial) {
      std::fill(partial, partial + width, 0.0f);
    }
    for (int64_t r = task * each; r < std::min(rows, (task + 1) * each); ++r) {
      work(r, buffer.get(), partial);
    }
  });
  if (total) {
    std::fill(total, total + width, 0.0f);
    for (int64_t task = 0; task < tasks; ++task) {
      const float* partial = partials.get() + task * width;
      for (int64_t k = 0; k < width; ++k) {
        total[k] += partial[k];
      }
    }
  }
}

float inverse_norm(const float* x, int64_t width, float eps) {
  const float squares = lane_sum(width, [&](int64_t k) {
    const Vec v = load(x + k);
    return v * v;
  });
  return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

// The gradient of y = x * inverse * weight with respect to x, where inverse depends on x:
//   inverse (g w - x inverse^2 mean(g w x)); and what a row adds to that of the weight: g x
//   inverse.
void norm_gradient(const float* x, const float* grad, const float* weight, float inverse,
                   int64_t width, float* out, float* partial) {
  const float along =
      lane_sum(width, [&](int64_t k) { return load(grad + k) * load(weight + k) * load(x + k); });
  const float pull = inverse * inverse * (along / static_cast<float>(width));
  if (partial) {
    for (int64_t k = 0; k < width; ++k) {
      partial[k] += grad[k] * (x[k] * inverse);
    }
  }
  for (int64_t k = 0; k < width; ++k) {
    out[k] = inverse * (grad[k] * weight[k] - x[k] * pull);
  }
}

// act(g) = g sigmoid(u) with u = g for SiLU, and twice the argument of its tanh for GELU; and
// du/dg.
template <bool Gelu>
struct Gate {
  static constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static Vec sigmoid(Vec g) {
    return 1.0f / (1.0f + exp(Gelu ? g * (1.0f + 0.044715f * (g * g)) * -kTwice : -g));
  }
  static Vec slope(Vec g) {
    // Where the square would overflow, sigmoid has long been 0 or 1.
    return Gelu ? kTwice * (1.0f + 3.0f * 0.044715f * at_most(g * g, splat(1e6f))) : splat(1.0f);
  }
};

template <bool Gelu>
void glu_block(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec g = load(gate + k);
    store(out + k, g * Gate<Gelu>::sigmoid(g) * load(up + k));
  }
}

template <bool Gelu>
void glu_gradients(const float* gate, const float* up, const float* grad, int64_t n, float* to_gate,
                   float* to_up) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec g = load(gate + k), d = load(grad + k), s = Gate<Gelu>::sigmoid(g);
    const Vec change = s + g * s * (1.0f - s) * Gate<Gelu>::slope(g);
    store(to_gate + k, d * load(up + k) * change);
    store(to_up + k, d * (g * s));
  }
}

constexpr int64_t kPiece = 1024;

// Calls work(at, n, three buffers of kPiece floats) for blocks of `count` elements.
template <class Work>
void for_blocks(int64_t count, int threads, const Work& work) {
  parallel_for(ceil_div(count, kTaskFloats), threads, [&](int64_t task) {
    Buffer<float> buffer(3 * kPiece);
    const int64_t end = std::min(count, (task + 1) * kTaskFloats);
    for (int64_t at = task * kTaskFloats; at < end; at += kPiece) {
      work(at, std::min(kPiece, end - at), buffer.get());
    }
  });
}

}  // namespace

void rmsnorm(const RmsnormArgs& a, int threads) {
  const int64_t w = a.width, padded = round_up(w, kSixteen);
  for_rows(a.rows, w, 2 * padded, nullptr, 0, threads, [&](int64_t r, float* buffer, float*) {
    const float* x = read(a.x, a.type, r * w, w, buffer);
    if (a.residual) {
      const float* other = read(a.residual, a.type, r * w, w, buffer + padded);
      const Sink sum(a.sum, a.type, r * w, w, buffer);
      float* to = sum.get();
      for (int64_t k = 0; k < padded; ++k) {
        to[k] = x[k] + other[k];
      }
      sum.done();
      x = read(a.sum, a.type, r * w, w, buffer);
    }
    const float inverse = inverse_norm(x, w, a.eps);
    const Sink out(a.out, a.type, r * w, w, buffer + padded);
    float* to = out.get();
    for (int64_t k = 0; k < w; ++k) {
      to[k] = (x[k] * inverse) * a.weight[k];
    }
    out.done();
    a.inverse[r] = inverse;
  });
}

void rmsnorm_bwd(const RmsnormBackwardArgs& a, int threads) {
  const int64_t w = a.width, padded = round_up(w, kSixteen);
  for_rows(a.rows, w, 3 * padded, a.grad_weight, w, threads,
           [&](int64_t r, float* buffer, float* partial) {
             const float* x = read(a.sum, a.type, r * w, w, buffer);
             const float* grad = read(a.grad_out, a.type, r * w, w, buffer + padded);
             const Sink out(a.grad, a.type, r * w, w, buffer + 2 * padded);
             float* to = out.get();
             norm_gradient(x, grad, a.weight, a.inverse[r], w, to, partial);
             if (a.grad_sum) {
               const float* more = read(a.grad_sum, a.type, r * w, w, buffer);
               for (int64_t k = 0; k < w; ++k) {
                 to[k] += more[k];
               }
             }
             out.done();
           });
}

void rope(const RopeArgs& a, int threads) {
  const int64_t w = a.width, half = w / 2, padded = round_up(w, kSixteen);
  for_rows(a.tokens, a.heads * w, 2 * padded, nullptr, 0, threads,
           [&](int64_t t, float* buffer, float*) {
             const float *c = a.cosine + t * half, *s = a.sine + t * half;
             for (int64_t h = 0; h < a.heads; ++h) {
               const int64_t at = (t * a.heads + h) * w;
               const float* n = read(a.x, a.type, at, w, buffer);
               if (a.weight) {
                 const float inverse = inverse_norm(n, w, a.eps);
                 for (int64_t k = 0; k < w; ++k) {
                   buffer[k] = (n[k] * inverse) * a.weight[k];
                 }
                 n = buffer;
               }
               const Sink out(a.out, a.type, at, w, buffer + padded);
               float* to = out.get();
               for (int64_t i = 0; i < half; ++i) {
                 to[i] = n[i] * c[i] - n[i + half] * s[i];
                 to[i + half] = n[i + half] * c[i] + n[i] * s[i];
               }
               out.done();
             }
           });
}

void rope_bwd(const RopeBackwardArgs& b, int threads) {
  const RopeArgs& a = b.at;
  const int64_t w = a.width, half = w / 2, padded = round_up(w, kSixteen);
  for_rows(a.tokens, a.heads * w, 4 * padded, b.grad_weight, w, threads,
           [&](int64_t t, float* buffer, float* partial) {
             const float *c = a.cosine + t * half, *s = a.sine + t * half;
             float* back = buffer + 2 * padded;
             std::fill(back + w, back + padded, 0.0f);
             for (int64_t h = 0; h < a.heads; ++h) {
               const int64_t at = (t * a.heads + h) * w;
               const float* grad = read(b.grad_out, a.type, at, w, buffer);
               const Sink out(b.grad, a.type, at, w, buffer + 3 * padded);
               float* turned = a.weight ? back : out.get();
               for (int64_t i = 0; i < half; ++i) {
                 turned[i] = grad[i] * c[i] + grad[i + half] * s[i];
                 turned[i + half] = grad[i + half] * c[i] - grad[i] * s[i];
               }
               if (a.weight) {
                 const float* x = read(a.x, a.type, at, w, buffer + padded);
                 norm_gradient(x, turned, a.weight, inverse_norm(x, w, a.eps), w, out.get(),
                               partial);
               }
               out.done();
             }
           });
}

void glu(const GluArgs& a, int threads) {
  for_blocks(a.count, threads, [&](int64_t at, int64_t n, float* buffer) {
    const float* gate = read(a.gate, a.type, at, n, buffer);
    const float* up = read(a.up, a.type, at, n, buffer + kPiece);
    const Sink out(a.out, a.type, at, n, buffer);
    (a.gelu ? glu_block<true> : glu_block<false>)(gate, up, n, out.get());
    out.done();
  });
}

void glu_bwd(const GluBackwardArgs& b, int threads) {
  const GluArgs& a = b.at;
  for_blocks(a.count, threads, [&](int64_t at, int64_t n, float* buffer) {
    const float* gate = read(a.gate, a.type, at, n, buffer);
    const float* up = read(a.up, a.type, at, n, buffer + kPiece);
    const float* grad = read(b.grad_out, a.type, at, n, buffer + 2 * kPiece);
    const Sink to_gate(b.grad_gate, a.type, at, n, buffer);
    const Sink to_up(b.grad_up, a.type, at, n, buffer + kPiece);
    (a.gelu ? glu_gradients<true> : glu_gradients<false>)(gate, up, grad, n, to_gate.get(),
                                                          to_up.get());
    to_gate.done();
    to_up.done();
  });
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

// One step: M rows through all layers. Activations stay in panels, a row per lane
// (decode_panels.h); only attention (decode_attention.h) and the cache see them row by row. Each
// product streams its weights once for all rows.
#pragma once

#include "decode_attention.h"
#include "decode_bytes.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kWorthReducing = 256 << 10;  // multiplications of adapters, for more threads

template <class Kind>
class Decoder {
 public:
  Decoder(const DecodeModel& m, const DecodeArgs& a, Arena& arena, int threads)
      : m_(m),
        a_(a),
        threads_(threads),
        lanes_{a.rows},
        depth_(round_up(m.head_size, kLanes)),
        projected_((m.heads + 2 * m.kv_heads) * m.head_size),
        inner_(m.layers[0].gate.rows),
        slot_(lanes_.panels() * most_rank(m) * kPanel),
        attention_(m, a, arena, threads),
        x_(arena, lanes_.panels() * m.width * kPanel),
        y_(arena, lanes_.panels() * std::max(projected_, m.width) * kPanel),
        angles_(arena, lanes_.panels() * m.head_size * kPanel),
        low_(arena, 3 * slot_),
        input_(arena, lanes_, std::max(m.width, m.heads * m.head_size)),
        gated_(arena, lanes_, inner_) {}

  void run() {
    begin();
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      const DecodeLayer& layer = m_.layers[i];
      normalize(layer.attention_norm);
      project(layer);
      place(layer, i);
      attention_.run(i);
      merge();
      add(layer.o, input_, layer.post_attention_norm);
      normalize(layer.mlp_norm);
      gate(layer);
      add(layer.down, gated_, layer.post_mlp_norm);
    }
    end();
  }

 private:
  // Rows of the embedding, and of the table of angles.
  void begin() {
    const int64_t half = m_.head_size / 2;
    if (!lanes_.full()) {
      std::memset(x_.get(), 0, lanes_.panels() * m_.width * kPanel * 4);
    }
    parallel_for(lanes_.count(), threads_, [&](int64_t v) {
      Buffer<float> rows(kLanes * round_up(m_.width, kLanes));
      const float *row[kLanes], *cosine[kLanes], *sine[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = v * kLanes + i;
        row[i] = cosine[i] = sine[i] = nullptr;
        if (r >= a_.rows) {
          continue;
        }
        float* floats = rows.get() + i * round_up(m_.width, kLanes);
        const int64_t at = a_.tokens[r] * m_.embedding_stride * bytes(m_.type);
        to_floats(static_cast<const char*>(m_.embedding) + at, m_.type, m_.width, floats);
        for (int64_t k = 0; k < m_.width; ++k) {
          floats[k] *= m_.embedding_scale;
        }
        row[i] = floats;
        cosine[i] = a_.cosine + a_.positions[r] * half;
        sine[i] = a_.sine + a_.positions[r] * half;
      }
      to_lanes(row, m_.width, kPanel, x_.get() + Lanes::at(v, m_.width));
      float* angles = angles_.get() + Lanes::at(v, m_.head_size);
      for (int64_t k = 0; k < half; ++k) {
        for (int i = 0; i < kLanes; ++i) {
          angles[k * kPanel + i] = cosine[i] ? cosine[i][k] : 0.0f;
          angles[(half + k) * kPanel + i] = sine[i] ? sine[i][k] : 0.0f;
        }
      }
    });
  }

  // input_ = norm(x_)
  void normalize(const void* norm) {
    const Parameters weight(norm, m_.type, m_.width);
    const int threads = a_.rows * m_.width < kWorthWaking ? 1 : threads_;
    parallel_for(lanes_.count(), threads, [&](int64_t v) {
      const float* x = x_.get() + Lanes::at(v, m_.width);
      const Vec scale = inverse_rms(x, m_.width, kPanel, m_.eps);
      const auto put = input_.vector(v, m_.width);
      for (int64_t k = 0; k < m_.width; k += 2) {
        put(k, normal(x, k, scale, weight), normal(x, k + 1, scale, weight));
      }
    });
    input_.complete(m_.width, threads_);
  }

  Vec normal(const float* x, int64_t k, Vec scale, const Parameters& weight) const {
    return load(x + k * kPanel) * scale * (m_.norm_offset + weight[k]);
  }

  static int64_t most_rank(const DecodeModel& m) {
    int64_t most = 0;
    for (const DecodeLayer& l : m.layers) {
      for (const DecodeLinear* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) {
        most = std::max(most, w->rank());
      }
    }
    return most;
  }

  // What adapters of the linears that read `from` reduce it to, a slot of low_ for each linear.
  void reduce(std::initializer_list<const DecodeLinear*> linears, const Operand<Kind>& from) {
    struct Piece {
      const DecodeMatrix* a;
      int64_t r0;
      float* to;
      int64_t rank;
    };
    std::vector<Piece> pieces;
    int64_t slot = 0, work = 0;
    for (const DecodeLinear* w : linears) {
      float* to = low(slot++);
      for (const LowRank& adapter : w->adapters) {
        const DecodeMatrix& a = adapter.a;
        for (int64_t r0 = 0; r0 < a.rows; r0 += kRows) {
          pieces.push_back({&a, r0, to + r0 * kPanel, w->rank()});
        }
        to += a.rows * kPanel;
        work += a.rows * a.depth * a_.rows;
      }
    }
    const int64_t count = pieces.size();
    const int threads = work < kWorthReducing ? 1 : threads_;
    parallel_for(count * lanes_.panels(), threads, [&](int64_t task) {
      const Piece& piece = pieces[task % count];
      const int64_t p = task / count, depth = piece.a->depth;
      BlockProduct<typename Kind::OfFloats> product(*piece.a);
      product.take(piece.r0, static_cast<int>(std::min<int64_t>(kRows, piece.a->rows - piece.r0)));
      product.with(from.unrounded(p, depth), piece.to + p * piece.rank * kPanel);
    });
  }

  // Of weights with so many rows of `depth` numbers.
  BlockTasks tasks_of(int64_t rows, int64_t depth) const {
    return {lanes_, rows, BlockProduct<Kind>::kTiles ? depth * 2 : 0, threads_};
  }

  float* low(int64_t slot) const { return low_.get() + slot * slot_; }

  // y_ = q, k and v of input_, one after the other.
  void project(const DecodeLayer& layer) {
    reduce({&layer.q, &layer.k, &layer.v}, input_);
    const DecodeLinear* weights[] = {&layer.q, &layer.k, &layer.v};
    const BlockTasks tasks[] = {tasks_of(layer.q.rows, m_.width), tasks_of(layer.k.rows, m_.width),
                                tasks_of(layer.v.rows, m_.width)};
    const int64_t q = tasks[0].count(), k = q + tasks[1].count(), v = k + tasks[2].count();
    parallel_for(v, threads_, [&](int64_t task) {
      const int which = task < q ? 0 : task < k ? 1 : 2;
      const int64_t before[] = {0, q, k};
      const int64_t first[] = {0, layer.q.rows, layer.q.rows + layer.k.rows};
      LinearProduct<Kind> product(*weights[which], low(which));
      alignas(64) float z[kRowsTogether * kPanel];
      Buffer<char> copy(tasks[which].copy);
      tasks[which].run(
          task - before[which], [&](int64_t r0, int n) { product.take(r0, n, copy.get()); },
          [&](int64_t r0, int n, int64_t p) {
            float* to = y_.get() + (p * projected_ + first[which] + r0) * kPanel;
            product.with(input_.panel(p, m_.width), p, product.exact() ? to : z);
            for (int r = 0; !product.exact() && r < n; ++r) {
              for (int j = 0; j < lanes_.vectors(p) * kLanes; j += kLanes) {
                store(to + r * kPanel + j, load(z + r * kPanel + j));
              }
            }
          });
    });
  }

  // Norms of heads, positions; queries to attention, keys and values to the cache.
  void place(const DecodeLayer& layer, int64_t i) {
    const Parameters q_norm(layer.q_norm, m_.type, m_.head_size);
    const Parameters k_norm(layer.k_norm, m_.type, m_.head_size);
    const int64_t heads = m_.heads + 2 * m_.kv_heads, d = m_.head_size;
    parallel_ranges(lanes_.count() * heads, threads_, [&](int64_t begin, int64_t end) {
      Buffer<float> turned(d * kLanes);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t v = task / heads, head = task % heads, first = v * kLanes;
        const int64_t rows = std::min<int64_t>(kLanes, a_.rows - first);
        const float* from = y_.get() + Lanes::at(v, projected_) + head * d * kPanel;
        if (head < m_.heads) {
          turn(v, from, q_norm, m_.attention_scale, turned.get());
          each_row(turned.get(), d, kLanes, [&](int r, int64_t k, Vec x) {
            if (r < rows) {
              store(attention_.query(first + r, head) + k, x);
            }
          });
          continue;
        }
        const int64_t kv_head = (head - m_.heads) % m_.kv_heads;
        const bool value = head >= m_.heads + m_.kv_heads;
        char* own[kLanes];
        for (int64_t r = 0; r < rows; ++r) {
          own[r] = attention_.own(i, value, first + r, kv_head);
        }
        const auto keep = [&](int r, int64_t k, Vec x) {
          if (r < rows) {
            store_as(x, m_.type, std::min<int64_t>(kLanes, d - k), own[r] + k * bytes(m_.type));
          }
        };
        if (value) {
          each_row(from, d, kPanel, keep);
        } else {
          turn(v, from, k_norm, 1.0f, turned.get());
          each_row(turned.get(), d, kLanes, keep);
        }
      }
    });
  }

  // A vector of heads, normalized if there is a norm, and turned by its rows' angles.
  void turn(int64_t v, const float* x, const Parameters& norm, float scale, float* to) const {
    const int64_t d = m_.head_size, half = d / 2;
    const float* angles = angles_.get() + Lanes::at(v, d);
    const Vec inverse = norm ? inverse_rms(x, d, kPanel, m_.eps) : Vec{};
    const auto normal = [&](int64_t k) {
      const Vec at = load(x + k * kPanel);
      return norm ? at * inverse * (m_.norm_offset + norm[k]) : at;
    };
    for (int64_t k = 0; k < half; ++k) {
      const Vec c = load(angles + k * kPanel), s = load(angles + (half + k) * kPanel);
      const Vec a = normal(k), b = normal(half + k);
      store(to + k * kLanes, (a * c - b * s) * scale);
      store(to + (half + k) * kLanes, (b * c + a * s) * scale);
    }
  }

  // input_ = what attention found, heads side by side.
  void merge() {
    const int64_t d = m_.head_size;
    parallel_ranges(lanes_.count() * m_.heads, threads_, [&](int64_t begin, int64_t end) {
      Buffer<float> rows(kLanes * depth_), turned(d * kLanes), factors(attention_.factors());
      const float* row[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        row[i] = rows.get() + i * depth_;
      }
      for (int64_t task = begin; task < end; ++task) {
        const int64_t v = task / m_.heads, head = task % m_.heads;
        attention_.merge(v * kLanes, head, rows.get(), factors.get());
        to_lanes(row, d, kLanes, turned.get());
        const auto put = input_.vector(v, m_.heads * d);
        for (int64_t k = 0; k < d; k += 2) {
          put(head * d + k, load(turned.get() + k * kLanes), load(turned.get() + (k + 1) * kLanes));
        }
      }
    });
    input_.complete(m_.heads * d, threads_);
  }

  // x_ += norm(weight from), or without a norm.
  void add(const DecodeLinear& w, const Operand<Kind>& from, const void* norm) {
    reduce({&w}, from);
    const BlockTasks tasks = tasks_of(w.rows, w.depth);
    float* const sum = norm ? y_.get() : x_.get();
    parallel_for(tasks.count(), threads_, [&](int64_t task) {
      LinearProduct<Kind> product(w, low(0));
      alignas(64) float z[kRowsTogether * kPanel];
      Buffer<char> copy(tasks.copy);
      tasks.run(
          task, [&](int64_t r0, int n) { product.take(r0, n, copy.get()); },
          [&](int64_t r0, int n, int64_t p) {
            float* to = sum + (p * m_.width + r0) * kPanel;
            const bool exact = product.exact();
            product.with(from.panel(p, w.depth), p, exact ? to : z, exact && !norm);
            for (int r = 0; !exact && r < n; ++r) {
              for (int j = 0; j < lanes_.vectors(p) * kLanes; j += kLanes) {
                const Vec y = load(z + r * kPanel + j);
                store(to + r * kPanel + j, norm ? y : load(to + r * kPanel + j) + y);
              }
            }
          });
    });
    if (norm) {
      const Parameters weight(norm, m_.type, m_.width);
      parallel_for(lanes_.count(), threads_, [&](int64_t v) {
        const float* y = y_.get() + Lanes::at(v, m_.width);
        float* x = x_.get() + Lanes::at(v, m_.width);
        const Vec scale = inverse_rms(y, m_.width, kPanel, m_.eps);
        for (int64_t k = 0; k < m_.width; ++k) {
          store(x + k * kPanel, load(x + k * kPanel) + normal(y, k, scale, weight));
        }
      });
    }
  }

  // gated_ = act(gate input_) * up input_
  void gate(const DecodeLayer& layer) {
    reduce({&layer.gate, &layer.up}, input_);
    const BlockTasks tasks = tasks_of(inner_, 2 * m_.width);
    parallel_for(tasks.count(), threads_, [&](int64_t task) {
      LinearProduct<Kind> gate(layer.gate, low(0)), up(layer.up, low(1));
      alignas(64) float g[kRowsTogether * kPanel], u[kRowsTogether * kPanel];
      Buffer<char> copy(tasks.copy);
      char* const of_up = copy.get() ? copy.get() + tasks.copy / 2 : nullptr;
      tasks.run(
          task,
          [&](int64_t r0, int n) {
            gate.take(r0, n, copy.get());
            up.take(r0, n, of_up);
          },
          [&](int64_t r0, int n, int64_t p) {
            const auto from = input_.panel(p, m_.width);
            gate.with(from, p, g);
            up.with(from, p, u);
            for (int j = 0; j < lanes_.vectors(p); ++j) {
              const auto product = [&](int r) {
                const int64_t at = r * kPanel + j * kLanes;
                const Vec x = load(g + at);
                return (m_.gelu ? gelu(x) : silu(x)) * load(u + at);
              };
              const auto put = gated_.vector(p * kVectors + j, inner_);
              for (int r = 0; r < n; r += 2) {
                put(r0 + r, product(r), product(r + 1));
              }
            }
          });
    });
    gated_.complete(inner_, threads_);
  }

  void end() {
    const Parameters weight(m_.final_norm, m_.type, m_.width);
    const int64_t width = round_up(m_.width, kLanes);
    parallel_for(lanes_.count(), threads_, [&](int64_t v) {
      Buffer<float> normed(m_.width * kLanes), rows(width * kLanes);
      const float* x = x_.get() + Lanes::at(v, m_.width);
      const Vec scale = inverse_rms(x, m_.width, kPanel, m_.eps);
      for (int64_t k = 0; k < m_.width; ++k) {
        store(normed.get() + k * kLanes, normal(x, k, scale, weight));
      }
      to_rows(normed.get(), m_.width, kLanes, rows.get());
      for (int64_t r = v * kLanes; r < std::min((v + 1) * kLanes, a_.rows); ++r) {
        from_floats(rows.get() + (r - v * kLanes) * width, m_.type, m_.width,
                    static_cast<char*>(a_.hidden) + r * m_.width * bytes(m_.type));
      }
    });
  }

  const DecodeModel& m_;
  const DecodeArgs& a_;
  const int threads_;
  const Lanes lanes_;
  const int64_t depth_, projected_, inner_, slot_;
  Attention attention_;
  Borrowed<float> x_;       // [panel][H][kPanel], the residual stream
  Borrowed<float> y_;       // what products leave
  Borrowed<float> angles_;  // [panel][D][kPanel]: cosines, then sines
  Borrowed<float> low_;     // per linear of a stage: [panel][rank][kPanel]
  Operand<Kind> input_, gated_;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

// Attention of new tokens over cached segments, a chunk of kKeys keys of one segment and one key
// head at a time. A segment that many rows share is read once for all of them: their queries ride
// in lanes,
//
//   scores[keys x queries] = K[keys x D] * Q[D x queries],  out[D x queries] = V^T * exp(scores -
//   max)
//
// A row's own segment has too few queries for that, so there the lanes run along D and the keys.
// A chunk's maximum, sum and unscaled output are kept in float and merged in order. Chunks are
// counted from the segment's start, so a row's bits do not depend on who else reads the segment.
#pragma once

#include <limits>
#include <vector>

#include "decode_panels.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kKeys = 240;  // in a chunk: few enough for multiply to sum in one go
static_assert(kKeys <= Floats::kSteps);
constexpr float kNone = -std::numeric_limits<float>::infinity();

class Attention {
 public:
  Attention(const DecodeModel& m, const DecodeArgs& a, Arena& arena, int threads)
      : m_(m),
        a_(a),
        threads_(threads),
        depth_(round_up(m.head_size, kLanes)),
        group_(m.heads / m.kv_heads),
        first_part_(plan()),
        query_(arena, a.rows * m.heads * depth_),
        out_(arena, first_part_[a.rows] * m.heads * depth_),
        max_(arena, first_part_[a.rows] * m.heads),
        sum_(arena, first_part_[a.rows] * m.heads) {}

  // The scaled query of a row and head, round_up(D, kLanes) floats.
  float* query(int64_t row, int64_t head) const {
    return query_.get() + (row * m_.heads + head) * depth_;
  }

  // Where key (0) or value (1) of row's own position lies.
  char* own(int64_t layer, int kind, int64_t row, int64_t kv_head) const {
    const int64_t s = a_.chain[a_.chain_begin[row + 1] - 1];
    return cached(layer, kind, s, kv_head, a_.positions[row] - a_.start[s]);
  }

  // All queries against all that they see, chunk by chunk.
  void run(int64_t layer) const {
    const int64_t count = items_.size() * m_.kv_heads;
    parallel_ranges(count, threads_, [&](int64_t begin, int64_t end) {
      const Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items_[i / m_.kv_heads];
        const int64_t kv_head = i % m_.kv_heads;
        if (a_.shared[visits_[item.begin].segment]) {
          attend_shared(layer, item, kv_head, scratch);
        } else {
          for (int64_t v = item.begin; v < item.end; ++v) {
            attend_own(layer, visits_[v], item.first, kv_head, scratch);
          }
        }
      }
    });
  }

  // What a head of kLanes rows from `row` comes to, [kLanes][round_up(D, kLanes)].
  void merge(int64_t row, int64_t head, float* to) const {
    for (int i = 0; i < kLanes; ++i) {
      float* merged = to + i * depth_;
      std::fill_n(merged, depth_, 0.0f);
      if (row + i >= a_.rows) {
        continue;
      }
      const int64_t begin = first_part_[row + i], end = first_part_[row + i + 1];
      float highest = kNone, total = 0.0f;
      for (int64_t p = begin; p < end; ++p) {
        highest = std::max(highest, max_[p * m_.heads + head]);
      }
      for (int64_t p = begin; p < end; ++p) {
        const int64_t at = p * m_.heads + head;
        if (sum_[at] == 0.0f) {
          continue;  // outside the window
        }
        const float scale = exp(splat(max_[at] - highest))[0];
        total += scale * sum_[at];
        for (int64_t d = 0; d < depth_; d += kLanes) {
          store(merged + d,
                fma(splat(scale), load(out_.get() + at * depth_ + d), load(merged + d)));
        }
      }
      for (int64_t d = 0; d < depth_; d += kLanes) {
        store(merged + d, load(merged + d) / total);
      }
    }
  }

 private:
  // A row that reads a segment up to `limit`, and where its chunks' results go.
  struct Visit {
    int64_t segment, row, limit, part;
  };
  // A chunk of the segment that visits [begin, end) read.
  struct Item {
    int64_t begin, end, first, keys;
  };

  // For a task's chunks. The keys and values of one, as floats, `depth_` or D of them apart.
  struct Scratch {
    explicit Scratch(const Attention& a)
        : floats(2 * round_up(a.most_keys_, kLanes) * a.depth_),
          query(a.depth_ * kPanel),
          scores(round_up(a.most_keys_, kBlock) * kPanel),
          out(round_up(a.depth_, kBlock) * kPanel),
          rows(kLanes * a.depth_) {}
    Buffer<float> floats, query, scores, out, rows;
  };

  std::vector<int64_t> plan() {
    std::vector<int64_t> first_part(a_.rows + 1);
    int64_t parts = 0;
    for (int64_t row = 0; row < a_.rows; ++row) {
      first_part[row] = parts;
      const int64_t end = a_.chain_begin[row + 1];
      for (int64_t c = a_.chain_begin[row]; c < end; ++c) {
        const int64_t s = a_.chain[c];
        const int64_t until = c + 1 < end ? a_.start[a_.chain[c + 1]] : a_.positions[row] + 1;
        const int64_t limit = until - a_.start[s];
        visits_.push_back({s, row, limit, parts});
        parts += ceil_div(limit, kKeys);
      }
    }
    first_part[a_.rows] = parts;
    std::stable_sort(visits_.begin(), visits_.end(),
                     [](const Visit& x, const Visit& y) { return x.segment < y.segment; });
    const int64_t count = visits_.size();
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
      int64_t limit = 0;
      for (; end < count && visits_[end].segment == visits_[begin].segment; ++end) {
        limit = std::max(limit, visits_[end].limit);
      }
      for (int64_t first = 0; first < limit; first += kKeys) {
        items_.push_back({begin, end, first, std::min(kKeys, limit - first)});
        most_keys_ = std::max(most_keys_, items_.back().keys);
      }
    }
    return first_part;
  }

  char* cached(int64_t layer, int kind, int64_t s, int64_t kv_head, int64_t key) const {
    const int64_t at =
        (((layer * 2 + kind) * m_.kv_heads + kv_head) * a_.capacity[s] + key) * m_.head_size;
    return reinterpret_cast<char*>(a_.base[s]) + at * bytes(m_.type);
  }

  // The queries of a panel, and the keys [low, high) of the chunk that each sees.
  struct Panel {
    int64_t count = 0;
    float* query[kPanel];
    int64_t part[kPanel];  // -1 where the row does not reach the chunk
    int32_t low[kPanel], high[kPanel];
    bool any = false;
  };

  Panel panel(const Item& item, int64_t window, int64_t kv_head, int64_t q0) const {
    Panel p;
    p.count = std::min<int64_t>(kPanel, (item.end - item.begin) * group_ - q0);
    for (int64_t i = 0; i < kPanel; ++i) {
      p.query[i] = nullptr;
      p.part[i] = -1;
      p.low[i] = p.high[i] = 0;
      if (i >= p.count) {
        continue;
      }
      const Visit& visit = visits_[item.begin + (q0 + i) / group_];
      if (visit.limit <= item.first) {
        continue;
      }
      const int64_t head = kv_head * group_ + (q0 + i) % group_;
      const int64_t chunk = a_.start[visit.segment] + item.first;
      const int64_t oldest = window > 0 ? a_.positions[visit.row] - window + 1 : 0;
      p.query[i] = query(visit.row, head);
      p.part[i] = (visit.part + item.first / kKeys) * m_.heads + head;
      p.high[i] = static_cast<int32_t>(std::min(visit.limit - item.first, item.keys));
      p.low[i] = static_cast<int32_t>(std::min(std::max<int64_t>(oldest - chunk, 0), item.keys));
      p.any = true;
    }
    return p;
  }

  // Where the `keys` keys (kind 0) or values (1) of a chunk are as floats, `width` apart.
  const float* as_floats(int64_t layer, int kind, int64_t s, int64_t kv_head, int64_t first,
                         int64_t keys, int64_t width, const Scratch& scratch) const {
    const int64_t d = m_.head_size;
    const char* from = cached(layer, kind, s, kv_head, first);
    if (m_.type == Float::f32 && width == d) {
      return reinterpret_cast<const float*>(from);
    }
    float* to = scratch.floats.get() + kind * round_up(most_keys_, kLanes) * depth_;
    if (width == d) {
      to_floats(from, m_.type, keys * d, to);
    } else {
      for (int64_t k = 0; k < keys; ++k) {
        to_floats(from + k * d * bytes(m_.type), m_.type, d, to + k * width);
        std::fill_n(to + k * width + d, width - d, 0.0f);
      }
    }
    return to;
  }

  void attend_shared(int64_t layer, const Item& item, int64_t kv_head,
                     const Scratch& scratch) const {
    const int64_t d = m_.head_size, s = visits_[item.begin].segment;
    const auto floats = [&](int kind) {
      return as_floats(layer, kind, s, kv_head, item.first, item.keys, d, scratch);
    };
    const float* const kv[] = {floats(0), floats(1)};
    const auto &query = scratch.query, &scores = scratch.scores, &out = scratch.out,
               &rows = scratch.rows;
    for (int64_t q0 = 0; q0 < (item.end - item.begin) * group_; q0 += kPanel) {
      const Panel p = panel(item, m_.layers[layer].window, kv_head, q0);
      if (!p.any) {
        continue;
      }
      const int wanted = static_cast<int>(ceil_div(p.count, kLanes));
      const int vectors = wanted > 2 ? kVectors : wanted;
      for (int j = 0; j < vectors; ++j) {
        to_lanes(p.query + j * kLanes, d, kPanel, query.get() + j * kLanes);
      }
      multiply_rows(kv[0], d, 1, item.keys, d, query.get(), vectors, scores.get());
      for (int j = 0; j < vectors; ++j) {
        soften(scores.get() + j * kLanes, item.keys, p, j * kLanes);
      }
      multiply_rows(kv[1], 1, d, d, item.keys, scores.get(), vectors, out.get());
      for (int j = 0; j < wanted; ++j) {
        to_rows(out.get() + j * kLanes, d, kPanel, rows.get());
        for (int i = 0; i < kLanes; ++i) {
          const int64_t part = p.part[j * kLanes + i];
          if (part >= 0) {
            std::memcpy(out_.get() + part * depth_, rows.get() + i * depth_, depth_ * 4);
          }
        }
      }
    }
  }

  // One row and its group of heads against a chunk of its own segment.
  void attend_own(int64_t layer, const Visit& visit, int64_t first, int64_t kv_head,
                  const Scratch& scratch) const {
    const int64_t keys = std::min(kKeys, visit.limit - first), window = m_.layers[layer].window;
    if (keys <= 0) {
      return;
    }
    const int64_t chunk = a_.start[visit.segment] + first;
    const int64_t oldest = window > 0 ? a_.positions[visit.row] - window + 1 : 0;
    const int64_t low = std::min(std::max<int64_t>(oldest - chunk, 0), keys);
    const auto floats = [&](int kind) {
      return as_floats(layer, kind, visit.segment, kv_head, first, keys, depth_, scratch);
    };
    const bool in_place = m_.type == Float::f32 && depth_ == m_.head_size;
    const int64_t readable = in_place ? a_.capacity[visit.segment] - first : round_up(keys, kLanes);
    const float *key = floats(0), *value = floats(1);
    float* scores = scratch.scores.get();
    for (int64_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      const int64_t part = (visit.part + first / kKeys) * m_.heads + head;
      const float highest = score(query(visit.row, head), key, low, keys, readable, scores);
      max_[part] = highest;
      sum_[part] = 0.0f;
      if (low < keys) {
        sum_[part] = soften(scores, low, keys, highest);
        weigh(scores, value, low, keys, out_.get() + part * depth_);
      }
    }
  }

  // Scores of the keys [low, keys), and their maximum. Lanes along D, then along keys. There is
  // room for `readable` keys, of which those from `keys` on hold anything.
  float score(const float* query, const float* key, int64_t low, int64_t keys, int64_t readable,
              float* scores) const {
    Vec highest = splat(kNone);
    for (int64_t k = low / kLanes * kLanes; k < keys; k += kLanes) {
      Vec x = k + kLanes <= readable
                  ? products(query, key + k * depth_, std::integral_constant<int, kLanes>())
                  : products(query, key + k * depth_, static_cast<int>(keys - k));
      if (m_.softcap > 0.0f) {
        x = m_.softcap * tanh(x / m_.softcap);
      }
      store(scores + k, x);
      highest = at_least(highest, select(between(k, low, keys), x, splat(kNone)));
    }
    return fold(highest, [](Vec a, Vec b) { return at_least(a, b); })[0];
  }

  // The query times each of `count` keys, in lanes. A constant count keeps the sums in registers.
  template <class Count>
  Vec products(const float* query, const float* key, Count count) const {
    Vec sums[kLanes] = {};
    for (int64_t d = 0; d < depth_; d += kLanes) {
      const Vec q = load(query + d);
      for (int i = 0; i < count; ++i) {
        sums[i] = fma(q, load(key + i * depth_ + d), sums[i]);
      }
    }
    return sums_of(sums);
  }

  // Lanes k, k + 1, ... that lie in [low, high).
  static IVec between(int64_t k, int64_t low, int64_t high) {
    IVec lane;
    for (int i = 0; i < kLanes; ++i) {
      lane[i] = i;
    }
    lane += static_cast<int32_t>(k);
    return (lane >= static_cast<int32_t>(low)) & (lane < static_cast<int32_t>(high));
  }

  // Scores to exp(score - highest), and their sum.
  static float soften(float* scores, int64_t low, int64_t keys, float highest) {
    Vec sums = {};
    for (int64_t k = low / kLanes * kLanes; k < keys; k += kLanes) {
      const Vec x = at_least(load(scores + k) - highest, splat(kLowest));
      const Vec e = select(between(k, low, keys), exp_from_lowest(x), Vec{});
      store(scores + k, e);
      sums += e;
    }
    return fold(sums, [](Vec a, Vec b) { return a + b; })[0];
  }

  // out = sum of weight k times value k, over [low, keys).
  void weigh(const float* weights, const float* value, int64_t low, int64_t keys,
             float* out) const {
    int64_t d = 0;
    for (; d + 4 * kLanes <= depth_; d += 4 * kLanes) {
      weigh<4>(weights, value + d, low, keys, out + d);
    }
    for (; d < depth_; d += kLanes) {
      weigh<1>(weights, value + d, low, keys, out + d);
    }
  }

  template <int V>
  void weigh(const float* weights, const float* value, int64_t low, int64_t keys,
             float* out) const {
    Vec even[V] = {}, odd[V] = {};  // two chains of additions
    int64_t k = low;
    for (; k + 1 < keys; k += 2) {
      for (int j = 0; j < V; ++j) {
        const float* at = value + k * depth_ + j * kLanes;
        even[j] = fma(splat(weights[k]), load(at), even[j]);
        odd[j] = fma(splat(weights[k + 1]), load(at + depth_), odd[j]);
      }
    }
    for (int j = 0; j < V; ++j) {
      if (k < keys) {
        even[j] = fma(splat(weights[k]), load(value + k * depth_ + j * kLanes), even[j]);
      }
      store(out + j * kLanes, even[j] + odd[j]);
    }
  }

  // c[n, kPanel] = A[n x depth] * b, element (i, k) of A at a[i * row + k * step].
  static void multiply_rows(const float* a, int64_t row, int64_t step, int64_t n, int64_t depth,
                            const float* b, int vectors, float* c) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(a);
    rows.stride = step * 4;
    for (int64_t i = 0; i < n; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, n - i));
      for (int r = 0; r < kBlock; ++r) {
        rows.row[r] = (i + std::min(r, count - 1)) * row * 4;
      }
      multiply<Floats>(rows, count, depth, b, vectors, c + i * kPanel);
    }
  }

  // Scores of a vector of queries to exp(score - max), with their maximum and sum.
  void soften(float* scores, int64_t keys, const Panel& p, int lane) const {
    IVec low, high;
    std::memcpy(&low, p.low + lane, sizeof low);
    std::memcpy(&high, p.high + lane, sizeof high);
    Vec highest = splat(kNone), sum = {};
    for (int64_t k = 0; k < keys; ++k) {
      Vec x = load(scores + k * kPanel);
      if (m_.softcap > 0.0f) {
        x = m_.softcap * tanh(x / m_.softcap);
        store(scores + k * kPanel, x);
      }
      const IVec key = IVec{} + static_cast<int32_t>(k);
      highest = at_least(highest, select((key >= low) & (key < high), x, splat(kNone)));
    }
    for (int64_t k = 0; k < keys; ++k) {
      const IVec key = IVec{} + static_cast<int32_t>(k);
      const Vec x = at_least(load(scores + k * kPanel) - highest, splat(kLowest));
      const Vec e = select((key >= low) & (key < high), exp_from_lowest(x), Vec{});
      store(scores + k * kPanel, e);
      sum += e;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (p.part[lane + i] >= 0) {
        max_[p.part[lane + i]] = highest[i];
        sum_[p.part[lane + i]] = sum[i];
      }
    }
  }

  const DecodeModel& m_;
  const DecodeArgs& a_;
  const int threads_;
  const int64_t depth_, group_;
  std::vector<Visit> visits_;  // by segment, then row
  std::vector<Item> items_;
  int64_t most_keys_ = 0;
  std::vector<int64_t> first_part_;  // of each row
  Borrowed<float> query_;            // [M, Hq, depth]
  Borrowed<float> out_, max_, sum_;  // [parts, Hq] and depth
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

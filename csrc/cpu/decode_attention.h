// Attention of new tokens over cached segments. Rows that share a segment read each of its keys and
// values once: their queries ride in lanes,
//
//   scores[keys x queries] = K[keys x D] * Q[D x queries],  out[D x queries] = V^T * exp(scores -
//   max)
//
// a chunk of kKeys keys of one segment and one key head at a time. A chunk's maximum, sum and
// unscaled output are kept in float, a row of them per query, and merged in order. Chunks are
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
  Attention(const DecodeModel& m, const DecodeArgs& a, int threads)
      : m_(m),
        a_(a),
        threads_(threads),
        depth_(round_up(m.head_size, kLanes)),
        group_(m.heads / m.kv_heads),
        first_part_(plan()),
        query_(a.rows * m.heads * depth_),
        out_(first_part_[a.rows] * m.heads * depth_),
        max_(first_part_[a.rows] * m.heads),
        sum_(first_part_[a.rows] * m.heads) {}

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
    parallel_for(static_cast<int64_t>(items_.size()) * m_.kv_heads, threads_, [&](int64_t task) {
      attend(layer, items_[task / m_.kv_heads], task % m_.kv_heads);
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

  void attend(int64_t layer, const Item& item, int64_t kv_head) const {
    const int64_t d = m_.head_size, s = visits_[item.begin].segment;
    const bool convert = m_.type != Float::f32;
    Buffer<float> floats(convert ? 2 * item.keys * d : 0);
    const float* kv[2];
    for (int kind = 0; kind < 2; ++kind) {
      const char* from = cached(layer, kind, s, kv_head, item.first);
      kv[kind] = reinterpret_cast<const float*>(from);
      if (convert) {
        float* to = floats.get() + kind * item.keys * d;
        to_floats(from, m_.type, item.keys * d, to);
        kv[kind] = to;
      }
    }
    Buffer<float> query(depth_ * kPanel), scores(round_up(item.keys, kBlock) * kPanel),
        out(round_up(d, kBlock) * kPanel), rows(kLanes * depth_);
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
      products(kv[0], d, 1, item.keys, d, query.get(), vectors, scores.get());
      for (int j = 0; j < vectors; ++j) {
        soften(scores.get() + j * kLanes, item.keys, p, j * kLanes);
      }
      products(kv[1], 1, d, d, item.keys, scores.get(), vectors, out.get());
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

  // c[n, kPanel] = A[n x depth] * b, element (i, k) of A at a[i * row + k * step].
  static void products(const float* a, int64_t row, int64_t step, int64_t n, int64_t depth,
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
  std::vector<int64_t> first_part_;  // of each row
  Buffer<float> query_;              // [M, Hq, depth]
  Buffer<float> out_, max_, sum_;    // [parts, Hq] and depth
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

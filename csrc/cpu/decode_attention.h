// Attention of new tokens over cached segments, in chunks of kKeys keys of one segment.
//
// A segment that many rows share is read once for all of them, a key head at a time: their queries
// ride in lanes,
//
//   scores[keys x queries] = K[keys x D] * Q[D x queries],  out[D x queries] = V^T * exp(scores -
//   max)
//
// In a row's own segment each query has keys of its own. There the lanes run along D for the
// products, and are queries for the softmax.
//
// A chunk's maximum, sum and unscaled output are kept in float and merged in order. Chunks are
// counted from the segment's start, so a row's bits do not depend on who else reads the segment.
#pragma once

#include <limits>
#include <vector>

#include "chunks.h"
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
    const int64_t shared = items_.size() * m_.kv_heads, own = ceil_div(units(), kLanes);
    parallel_ranges(shared + own, threads_, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        if (i < shared) {
          const Item& item = items_[i / m_.kv_heads];
#ifdef FASTRL_TILES
          if (m_.type == Float::bf16) {
            attend_shared(layer, item, i % m_.kv_heads, scratch, scratch.tiles);
            continue;
          }
#endif
          attend_shared(layer, item, i % m_.kv_heads, scratch, scratch.floats);
        } else {
          attend_own(layer, (i - shared) * kLanes, scratch);
        }
      }
    });
  }

  // What a head of kLanes rows from `row` comes to, to[kLanes][round_up(D, kLanes)]. For scratch,
  // factors() floats.
  void merge(int64_t row, int64_t head, float* to, float* factors) const {
    int64_t begin[kLanes], count[kLanes], most = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t r = std::min(row + i, a_.rows - 1);
      begin[i] = first_part_[r];
      count[i] = row + i < a_.rows ? first_part_[r + 1] - begin[i] : 0;
      most = std::max(most, count[i]);
    }
    const auto of_rows = [&](const Borrowed<float>& values, int64_t p, float otherwise) {
      Vec x = splat(otherwise);
      for (int i = 0; i < kLanes; ++i) {
        x[i] = p < count[i] ? values[(begin[i] + p) * m_.heads + head] : otherwise;
      }
      return x;
    };
    Vec highest = splat(kNone), total = {};
    for (int64_t p = 0; p < most; ++p) {
      highest = at_least(highest, of_rows(max_, p, kNone));
    }
    for (int64_t p = 0; p < most; ++p) {
      const Vec sum = of_rows(sum_, p, 0.0f);
      const Vec down = at_least(of_rows(max_, p, kNone) - highest, splat(kLowest));
      const Vec factor = select(sum == 0.0f, Vec{}, exp_from_lowest(down));
      store(factors + p * kLanes, factor);
      total = fma(factor, sum, total);
    }
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t d = 0; d < depth_; d += kLanes) {
        Vec merged = {};
        for (int64_t p = 0; p < count[i]; ++p) {
          const int64_t at = (begin[i] + p) * m_.heads + head;
          if (sum_[at] != 0.0f) {  // else outside the window
            merged =
                fma(splat(factors[p * kLanes + i]), load(out_.get() + at * depth_ + d), merged);
          }
        }
        store(to + i * depth_ + d, merged);
      }
    }
    const Vec inverse = 1.0f / select(total == 0.0f, splat(1.0f), total);  // of no row
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t d = 0; d < depth_; d += kLanes) {
        store(to + i * depth_ + d, load(to + i * depth_ + d) * inverse[i]);
      }
    }
  }

  int64_t factors() const { return most_parts_ * kLanes; }

 private:
  // A row that reads a shared segment up to `limit`, and where its chunks' results go.
  struct Visit {
    int64_t segment, row, limit, part;
  };
  // A chunk of the segment that visits [begin, end) read.
  struct Item {
    int64_t begin, end, first, keys;
  };
  // A chunk of a segment that only `row` reads.
  struct Own {
    int64_t segment, row, first, keys, part;
  };

  // For a task's chunks.
  struct Scratch {
    explicit Scratch(const Attention& a)
        : floats(a.m_.type, a.m_.head_size, a.most_keys_),
#ifdef FASTRL_TILES
          tiles(a.m_.head_size, a.most_keys_),
#endif
          query(a.depth_ * kPanel),
          scores(round_up(a.most_keys_, kBlock) * kPanel),
          out(round_up(a.depth_, kBlock) * kPanel),
          rows(kLanes * a.depth_) {
    }
    FloatChunk floats;
#ifdef FASTRL_TILES
    TileChunk tiles;
#endif
    const Buffer<float> query, scores, out, rows;
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
        if (a_.shared[s]) {
          visits_.push_back({s, row, limit, parts});
          parts += ceil_div(limit, kKeys);
        } else {
          for (int64_t first = 0; first < limit; first += kKeys) {
            own_.push_back({s, row, first, std::min(kKeys, limit - first), parts++});
          }
        }
      }
      most_parts_ = std::max(most_parts_, parts - first_part[row]);
    }
    first_part[a_.rows] = parts;
    // Chunks of about as many keys are computed together.
    std::stable_sort(own_.begin(), own_.end(),
                     [](const Own& x, const Own& y) { return x.keys > y.keys; });
    most_keys_ = own_.empty() ? 0 : own_[0].keys;
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

  // Heads of rows' own chunks, a chunk's heads one after the other.
  int64_t units() const { return own_.size() * m_.heads; }

  char* cached(int64_t layer, int kind, int64_t s, int64_t kv_head, int64_t key) const {
    const int64_t at =
        (((layer * 2 + kind) * m_.kv_heads + kv_head) * a_.capacity[s] + key) * m_.head_size;
    return reinterpret_cast<char*>(a_.base[s]) + at * bytes(m_.type);
  }

  // The queries of a panel, and the keys [low, high) of the chunk that each sees.
  struct Panel {
    int64_t count = 0;
    int vectors = 0;
    float* query[kPanel];
    int64_t part[kPanel];  // -1 where the row does not reach the chunk
    int32_t low[kPanel], high[kPanel];
    bool any = false;
  };

  Panel panel(const Item& item, int64_t window, int64_t kv_head, int64_t q0) const {
    Panel p;
    p.count = std::min<int64_t>(kPanel, (item.end - item.begin) * group_ - q0);
    p.vectors = static_cast<int>(ceil_div(p.count, kLanes));
    p.vectors = p.vectors > 2 ? kVectors : p.vectors;  // as many as products are made for
    for (int64_t i = 0; i < p.vectors * kLanes; ++i) {
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

  template <class Chunk>
  void attend_shared(int64_t layer, const Item& item, int64_t kv_head, const Scratch& scratch,
                     Chunk& chunk) const {
    const int64_t d = m_.head_size, segment = visits_[item.begin].segment;
    chunk.take(cached(layer, 0, segment, kv_head, item.first),
               cached(layer, 1, segment, kv_head, item.first), item.keys);
    const auto &query = scratch.query, &scores = scratch.scores, &out = scratch.out;
    for (int64_t q0 = 0; q0 < (item.end - item.begin) * group_; q0 += kPanel) {
      const Panel p = panel(item, m_.layers[layer].window, kv_head, q0);
      if (!p.any) {
        continue;
      }
      for (int j = 0; j < p.vectors; ++j) {
        to_lanes(p.query + j * kLanes, d, kPanel, query.get() + j * kLanes);
      }
      chunk.score(query.get(), p.vectors, scores.get());
      for (int j = 0; j < p.vectors; ++j) {
        soften(scores.get() + j * kLanes, item.keys, p, j * kLanes);
      }
      chunk.weigh(scores.get(), p.vectors, out.get());
      for (int j = 0; j < ceil_div(p.count, kLanes); ++j) {
        each_row(out.get() + j * kLanes, d, kPanel, [&](int i, int64_t k, Vec x) {
          const int64_t part = p.part[j * kLanes + i];
          if (part >= 0) {
            store(out_.get() + part * depth_ + k, x);
          }
        });
      }
    }
  }

  // kLanes units from `first` on, each a query and the keys [low, keys) of its chunk.
  struct Units {
    int64_t count = 0, least = 0, most = 0;  // keys that any of them reads
    int64_t streams = 0;                     // of values: a group of heads has one
    const char* stream[kLanes];
    const float* query[kLanes];
    const char *key[kLanes], *value[kLanes];
    int64_t last[kLanes], part[kLanes];
    int32_t low[kLanes], keys[kLanes];
  };

  void attend_own(int64_t layer, int64_t first, const Scratch& scratch) const {
    Units u;
    u.count = std::min<int64_t>(kLanes, units() - first);
    u.least = kKeys;
    const int64_t window = m_.layers[layer].window;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t unit = first + std::min<int64_t>(i, u.count - 1);
      const Own& own = own_[unit / m_.heads];
      const int64_t head = unit % m_.heads, kv_head = head / group_;
      const int64_t chunk = a_.start[own.segment] + own.first;
      const int64_t oldest = window > 0 ? a_.positions[own.row] - window + 1 : 0;
      const int64_t low = std::min(std::max<int64_t>(oldest - chunk, 0), own.keys);
      u.query[i] = query(own.row, head);
      u.key[i] = cached(layer, 0, own.segment, kv_head, own.first);
      u.value[i] = cached(layer, 1, own.segment, kv_head, own.first);
      u.last[i] = own.keys - 1;
      u.part[i] = own.part * m_.heads + head;
      if (i == 0 || u.value[i] != u.value[i - 1]) {
        u.stream[u.streams++] = u.value[i];
      }
      u.low[i] = static_cast<int32_t>(low);
      u.keys[i] = static_cast<int32_t>(own.keys);
      u.least = std::min(u.least, low);
      u.most = std::max(u.most, own.keys);
    }
    float* scores = scratch.scores.get();
    switch (m_.type) {
      case Float::f32:
        return attend_units<Float::f32>(u, scores);
      case Float::bf16:
        return attend_units<Float::bf16>(u, scores);
      case Float::f16:
        return attend_units<Float::f16>(u, scores);
    }
  }

  template <Float type>
  void attend_units(const Units& u, float* scores) const {
    if (m_.head_size == 2 * kLanes) {
      score<type, 2>(u, scores);
    } else if (m_.head_size == 4 * kLanes) {
      score<type, 4>(u, scores);
    } else {
      score<type, 0>(u, scores);
    }
    soften(u, scores);
    for (int i = 0; i < u.count; ++i) {
      if (u.low[i] < u.keys[i]) {
        weigh<type>(scores + i, u.value[i], u.low[i], u.keys[i], out_.get() + u.part[i] * depth_);
      }
    }
  }

  // The score of each unit's keys, a unit per lane; of a unit with fewer keys than others, its
  // last one's again. Heads have V vectors, or with 0 any number.
  template <Float type, int V>
  void score(const Units& u, float* scores) const {
    const int64_t size = bytes(type), row = m_.head_size * size;
    const int64_t whole = V ? V * kLanes : m_.head_size / kLanes * kLanes;
    for (int64_t k = u.least; k < u.most; ++k) {
      for (int64_t i = 0; i < u.streams; ++i) {  // read one by one later, each too late to wait for
        for (int64_t at = k * row; at < (k + 1) * row; at += 64) {
          __builtin_prefetch(u.stream[i] + at);
        }
      }
      Vec sums[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const char* key = u.key[i] + std::min(k, u.last[i]) * row;
        Vec sum = {};
        for (int64_t d = 0; d < whole; d += kLanes) {
          sum = fma(load(u.query[i] + d), load_as<type>(key + d * size), sum);
        }
        if (whole < m_.head_size) {
          sum = fma(load(u.query[i] + whole), load_some<type>(key + whole * size), sum);
        }
        sums[i] = sum;
      }
      store(scores + k * kLanes, sums_of(sums));
    }
  }

  // The last numbers of a head that does not fill its vectors.
  template <Float type>
  Vec load_some(const char* from) const {
    char filled[kLanes * 4] = {};
    std::memcpy(filled, from, m_.head_size % kLanes * bytes(type));
    return load_as<type>(filled);
  }

  // Scores of units to exp(score - max), with their maximum and sum.
  void soften(const Units& u, float* scores) const {
    IVec low, high;
    std::memcpy(&low, u.low, sizeof low);
    std::memcpy(&high, u.keys, sizeof high);
    Vec highest = splat(kNone), sum = {};
    soften(scores, kLanes, u.least, u.most, low, high, highest, sum);
    for (int i = 0; i < u.count; ++i) {
      max_[u.part[i]] = highest[i];
      sum_[u.part[i]] = sum[i];
    }
  }

  // out = sum of weight k, kLanes apart, times value k, over [low, keys).
  template <Float type>
  void weigh(const float* weights, const char* value, int64_t low, int64_t keys, float* out) const {
    const int64_t size = bytes(type), d = m_.head_size;
    int64_t at = 0;
    for (; at + 4 * kLanes <= d; at += 4 * kLanes) {
      weigh<type, 4>(weights, value + at * size, low, keys, out + at);
    }
    for (; at + 2 * kLanes <= d; at += 2 * kLanes) {
      weigh<type, 2>(weights, value + at * size, low, keys, out + at);
    }
    for (; at + kLanes <= d; at += kLanes) {
      weigh<type, 1>(weights, value + at * size, low, keys, out + at);
    }
    if (at < d) {
      Vec sum = {};
      for (int64_t k = low; k < keys; ++k) {
        const Vec x = load_some<type>(value + (k * d + at) * size);
        sum = fma(splat(weights[k * kLanes]), x, sum);
      }
      store(out + at, sum);
    }
  }

  template <Float type, int V>
  void weigh(const float* weights, const char* value, int64_t low, int64_t keys, float* out) const {
    constexpr int kChains = V == 4 ? 2 : 4;  // of additions, to wait for none
    const int64_t size = bytes(type), row = m_.head_size * size;
    Vec sums[kChains][V] = {};
    const auto add = [&](int64_t k, Vec(&sum)[V]) {
      for (int j = 0; j < V; ++j) {
        const Vec x = load_as<type>(value + k * row + j * kLanes * size);
        sum[j] = fma(splat(weights[k * kLanes]), x, sum[j]);
      }
    };
    int64_t k = low;
    for (; k + kChains <= keys; k += kChains) {
      for (int c = 0; c < kChains; ++c) {
        add(k + c, sums[c]);
      }
    }
    for (; k < keys; ++k) {
      add(k, sums[0]);
    }
    for (int j = 0; j < V; ++j) {
      Vec sum = sums[0][j] + sums[1][j];
      if constexpr (kChains == 4) {
        sum += sums[2][j] + sums[3][j];
      }
      store(out + j * kLanes, sum);
    }
  }

  // Scores of a vector of queries to exp(score - max), with their maximum and sum.
  void soften(float* scores, int64_t keys, const Panel& p, int lane) const {
    IVec low, high;
    std::memcpy(&low, p.low + lane, sizeof low);
    std::memcpy(&high, p.high + lane, sizeof high);
    Vec highest = splat(kNone), sum = {};
    soften(scores, kPanel, 0, keys, low, high, highest, sum);
    for (int i = 0; i < kLanes; ++i) {
      if (p.part[lane + i] >= 0) {
        max_[p.part[lane + i]] = highest[i];
        sum_[p.part[lane + i]] = sum[i];
      }
    }
  }

  // The same of keys [begin, end), `stride` floats apart; each lane sees its [low, high).
  void soften(float* scores, int64_t stride, int64_t begin, int64_t end, IVec low, IVec high,
              Vec& highest, Vec& sum) const {
    for (int64_t k = begin; k < end; ++k) {
      Vec x = load(scores + k * stride);
      if (m_.softcap > 0.0f) {
        x = m_.softcap * tanh(x / m_.softcap);
        store(scores + k * stride, x);
      }
      const IVec key = IVec{} + static_cast<int32_t>(k);
      highest = at_least(highest, select((key >= low) & (key < high), x, splat(kNone)));
    }
    for (int64_t k = begin; k < end; ++k) {
      const IVec key = IVec{} + static_cast<int32_t>(k);
      const Vec x = at_least(load(scores + k * stride) - highest, splat(kLowest));
      const Vec e = select((key >= low) & (key < high), exp_from_lowest(x), Vec{});
      store(scores + k * stride, e);
      sum += e;
    }
  }

  const DecodeModel& m_;
  const DecodeArgs& a_;
  const int threads_;
  const int64_t depth_, group_;
  std::vector<Visit> visits_;  // by segment, then row
  std::vector<Item> items_;
  std::vector<Own> own_;
  int64_t most_keys_ = 0, most_parts_ = 0;  // of a chunk; of a row
  std::vector<int64_t> first_part_;         // of each row
  Borrowed<float> query_;                   // [M, Hq, depth]
  Borrowed<float> out_, max_, sum_;         // [parts, Hq] and depth
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

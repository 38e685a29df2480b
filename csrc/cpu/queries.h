// The queries of attention in columns, and what each sees of the keys, in the namespace of the
// instruction set being compiled.
//
// Column c of a group and key head is its token c / share with query head c % share of those that
// read this key head: all of a group's completions, and all heads that share keys, stand side by
// side in the lanes of a panel, and one pass over a block of keys serves them all.
#pragma once

#include <cfloat>
#include <climits>

#include "attention.h"
#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kColumns = 256;  // taken together
constexpr int64_t kPanels = kColumns / kPanel;
constexpr int64_t kKeys = 192;  // of a segment, taken together

static_assert(kColumns % kPanel == 0 && kKeys % kBlock == 0 && kKeys % (2 * kLanes) == 0);

// Keys [from, to) that each column of a panel sees, on one side: prompt or own segment.
struct Seen {
  int32_t from[kPanel], to[kPanel];
  int32_t first, last;          // no column sees a key outside [first, last)
  int32_t all_first, all_last;  // every column sees all keys of [all_first, all_last)
};

// A run of columns: those of task number `index` of a group and key head.
struct Chunk {
  int64_t group, head, index;

  static int64_t count(const AttentionArgs& a, int64_t group) {
    const int32_t* at = a.offsets;
    const int64_t tokens = at[a.group_offsets[group + 1]] - at[a.group_offsets[group]];
    return ceil_div(tokens * (a.heads / a.kv_heads), kColumns);
  }
};

class Queries {
 public:
  Queries(const AttentionArgs& a, const Chunk& chunk)
      : a_(a),
        offsets_(a.offsets),
        prompt_(a.group_offsets[chunk.group]),
        first_(offsets_[prompt_]),
        share_(a.heads / a.kv_heads),
        head_(chunk.head),
        column_(chunk.index * kColumns) {
    const int64_t tokens = offsets_[a.group_offsets[chunk.group + 1]] - first_;
    count_ = std::min(kColumns, tokens * share_ - column_);
    look();
  }

  int64_t count() const { return count_; }
  int64_t panels() const { return ceil_div(count_, kPanel); }
  int64_t token(int64_t column) const { return first_ + (column_ + column) / share_; }
  int64_t head(int64_t column) const { return head_ * share_ + (column_ + column) % share_; }
  int64_t prompt_end() const { return offsets_[prompt_ + 1]; }
  const Seen& seen(int side, int64_t panel) const { return seen_[side][panel]; }

  // Vectors of the panel that hold columns, as many as the products are made for.
  int vectors(int64_t panel) const {
    const int64_t n = std::min<int64_t>(kPanel, count_ - panel * kPanel);
    return vectors_of(n);
  }
  static int vectors_of(int64_t columns) {
    const int n = static_cast<int>(ceil_div(columns, kLanes));
    return n > 2 ? kVectors : std::min(n, kVectors);
  }

  // Calls visit(side, first, n, p0, p1) for each block of keys [first, first + n) that some of the
  // panels [p0, p1) see, in the order of the keys. Blocks are counted from the start of their
  // segment, so that a column meets the same ones whatever columns are beside it.
  template <class Visit>
  void for_each_block(const Visit& visit) const {
    walk(0, offsets_[prompt_], offsets_[prompt_ + 1], visit);
    for (int64_t s = std::max(segment_, prompt_ + 1); s <= last_segment_; ++s) {
      walk(1, offsets_[s], offsets_[s + 1], visit);
    }
  }

 private:
  void look() {
    int64_t s = prompt_;
    while (offsets_[s + 1] <= token(0)) {
      ++s;
    }
    segment_ = s;
    const int64_t prompt = offsets_[prompt_ + 1] - first_;
    const int64_t window = a_.window ? a_.window : INT_MAX;
    for (int64_t p = 0; p < panels(); ++p) {
      Seen &shared = seen_[0][p], &own = seen_[1][p];
      for (Seen* side : {&shared, &own}) {
        *side = Seen{{}, {}, INT_MAX, 0, 0, INT_MAX};
      }
      for (int64_t i = 0; i < kPanel; ++i) {
        // Columns that are not there see what the last one does; nobody reads what they get.
        const int64_t t = token(std::min(p * kPanel + i, count_ - 1));
        while (offsets_[s + 1] <= t) {
          ++s;
        }
        const bool in_prompt = s == prompt_;
        const int64_t position = t - offsets_[s] + (in_prompt ? 0 : prompt);
        const int64_t oldest = std::max<int64_t>(0, position - window + 1);
        add(shared, i, first_ + oldest, std::min(t + 1, first_ + prompt));
        const int64_t skipped = std::max<int64_t>(0, oldest - prompt);
        add(own, i, offsets_[s] + skipped, in_prompt ? 0 : t + 1);
      }
    }
    last_segment_ = s;
  }

  static void add(Seen& side, int64_t i, int64_t from, int64_t to) {
    side.from[i] = static_cast<int32_t>(from);
    side.to[i] = static_cast<int32_t>(to);
    side.all_first = std::max(side.all_first, side.from[i]);
    side.all_last = std::min(side.all_last, side.to[i]);
    if (from < to) {
      side.first = std::min(side.first, side.from[i]);
      side.last = std::max(side.last, side.to[i]);
    }
  }

  template <class Visit>
  void walk(int side, int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t first = begin; first < end; first += kKeys) {
      const int64_t next = std::min(first + kKeys, end);
      int64_t last = first, p0 = panels(), p1 = 0;
      for (int64_t p = 0; p < panels(); ++p) {
        const Seen& seen = seen_[side][p];
        if (seen.first < next && seen.last > first) {
          p0 = std::min(p0, p);
          p1 = p + 1;
          last = std::max<int64_t>(last, seen.last);
        }
      }
      if (p0 < p1) {
        visit(side, first, std::min(last, next) - first, p0, p1);
      }
    }
  }

  const AttentionArgs& a_;
  const int32_t* offsets_;
  const int64_t prompt_, first_, share_, head_, column_;
  int64_t count_, segment_, last_segment_;
  Seen seen_[2][kPanels];
};

inline IVec load(const int32_t* from) {
  IVec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Where the keys `key`, one for all lanes, are seen by the panel's columns [at, at + kLanes).
inline IVec visible(const Seen& seen, int at, int64_t key) {
  const IVec k = IVec{} + static_cast<int32_t>(key);
  return (k >= load(seen.from + at)) & (k < load(seen.to + at));
}

// 2^x within 1 ulp; 0 below the normal numbers, where masked keys are. For x <= 0, or NaN.
inline Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer below
  const Vec shifted = x + kRound, r = x - (shifted - kRound);
  Vec p = splat(1.53533707e-4f);
  p = fma(p, r, splat(1.33988773e-3f));
  p = fma(p, r, splat(9.61843692e-3f));
  p = fma(p, r, splat(5.55033237e-2f));
  p = fma(p, r, splat(2.40226477e-1f));
  p = fma(p, r, splat(6.93147182e-1f));
  p = fma(p, r, splat(1.0f));
  return select(x < splat(-126.0f), Vec{}, as_float(as_int(p) + (as_int(shifted) << 23)));
}

// kStep neighbouring rows of C as a row of the depth of the next product.
inline void store_depth(Floats, float* to, const Vec (&rows)[1]) { store(to, rows[0]); }

#ifdef FASTRL_PAIRS
inline void store_depth(Pairs, uint32_t* to, const Vec (&rows)[2]) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}
#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

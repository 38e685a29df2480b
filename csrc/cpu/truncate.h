// Sampling from a row of logits cut down by top-k, top-p and min-p, in the namespace of the
// instruction set being compiled.
//
// In the order (logit descending, entry ascending) each rule keeps a beginning of the row, so what
// is kept is known by its last entry; nothing as long as the row is sorted.
#pragma once

#include <cmath>
#include <vector>

#include "noise.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

struct Draw {
  int64_t token;
  float logprob;
};

class TruncatedRow {
 public:
  // z[0, n), with room up to `padded`, a multiple of kLanes, which is filled with -inf; highest is
  // the finite maximum of z.
  TruncatedRow(float* z, int64_t n, int64_t padded, float highest)
      : z_(z), n_(n), padded_(padded), highest_(highest), last_(static_cast<int32_t>(n - 1)) {
    std::fill(z + n, z + padded, -kInfinity);
  }

  // Keeps the k largest and whatever equals the last of them; 0 < k < n.
  void top_k(int64_t k) {
    // k groups with a maximum of at least `bound` hold k entries of at least `bound`.
    constexpr int64_t kGroup = 16;  // in each lane
    std::vector<float> some;
    for (int64_t v = 0; v < padded_; v += kGroup * kLanes) {
      Vec most = load(z_ + v);
      for (int64_t u = v + kLanes; u < std::min(v + kGroup * kLanes, padded_); u += kLanes) {
        const Vec x = load(z_ + u);
        most = select(x > most, x, most);
      }
      some.resize(some.size() + kLanes);
      store(&*some.end() - kLanes, most);
    }
    const float bound = k <= static_cast<int64_t>(some.size()) ? kth_largest(some, k) : -kInfinity;
    some.clear();
    each_at_least(bound, [&](int64_t v) { some.push_back(z_[v]); });
    limit_ = kth_largest(some, k);
  }

  // Keeps an entry if the probability of those before it, among those kept so far, is below top_p.
  void top_p(double top_p) {
    double mass[kBins] = {}, total = 0.0;
    each_vector([&](int64_t, Vec x, IVec, Vec weight) {
      const Vec depth = this->depth(x), last = splat(kBins - 1);
      const IVec bin = __builtin_convertvector(select(depth < last, depth, last), IVec);
      for (int i = 0; i < kLanes; ++i) {
        mass[bin[i]] += weight[i];
      }
    });
    for (double m : mass) {
      total += m;
    }
    double before = 0.0;
    int b = 0;
    while (b < kBins - 1 && before + mass[b] < top_p * total) {
      before += mass[b++];
    }
    // The last entry kept is in this bin.
    const Vec from = splat(static_cast<float>(b));
    const Vec to = b < kBins - 1 ? from + 1.0f : splat(kInfinity);
    struct Entry {
      float z, weight;
      int64_t v;
    };
    std::vector<Entry> entries;
    each_vector([&](int64_t v, Vec x, IVec kept, Vec weight) {
      const Vec depth = this->depth(x);
      const IVec inside = kept & (depth >= from) & (depth < to);
      if (any(inside)) {
        for (int i = 0; i < kLanes; ++i) {
          if (inside[i]) {
            entries.push_back({x[i], weight[i], v + i});
          }
        }
      }
    });
    std::sort(entries.begin(), entries.end(), [](const Entry& x, const Entry& y) {
      return x.z > y.z || (x.z == y.z && x.v < y.v);
    });
    for (const Entry& entry : entries) {
      if (before >= top_p * total) {
        break;
      }
      limit_ = entry.z;
      last_ = static_cast<int32_t>(entry.v);
      before += entry.weight;
    }
  }

  // Keeps what is at least min_p times as probable as the most probable entry.
  void min_p(double min_p) {
    const float limit = static_cast<float>(highest_ + std::log(min_p));
    if (limit > limit_) {
      limit_ = limit;
      last_ = static_cast<int32_t>(n_ - 1);
    }
  }

  Draw draw(uint64_t stream) const {
    typedef double Doubles __attribute__((vector_size(2 * sizeof(Vec))));
    uint64_t streams[kLanes];  // of neighbouring entries, as noise_bits reads them
    for (int i = 0; i < kLanes; ++i) {
      streams[i % 2 * (kLanes / 2) + i / 2] = stream + static_cast<uint64_t>(i) * kGolden;
    }
    Draw drawn = {0, 0.0f};
    float best = -kInfinity, factor = kInfinity;  // factor = e^(highest - best)
    Doubles sums = {};
    each_vector([&](int64_t v, Vec x, IVec kept, Vec weight) {
      sums += __builtin_convertvector(weight, Doubles);
      const Bits bits = noise_bits(streams, v);
      // Written so that inf * 0 may win.
      const IVec may_win = kept & ~(about_uniform(bits) > weight * factor);
      if (any(may_win)) {
        for (int i = 0; i < kLanes; ++i) {
          const float perturbed = may_win[i] ? x[i] + gumbel(bits[i]) : -kInfinity;
          if (perturbed > best) {
            best = perturbed;
            factor = std::exp(highest_ - below(best));
            drawn.token = v + i;
          }
        }
      }
    });
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) {
      sum += sums[i];
    }
    drawn.logprob = static_cast<float>(z_[drawn.token] - highest_ - std::log(sum));
    return drawn;
  }

 private:
  static constexpr int kBins = 2048;
  static constexpr float kPerUnit = 32.0f;  // bins per unit of logit, counted from the highest

  static float kth_largest(std::vector<float>& values, int64_t k) {
    const auto at = values.begin() + (k - 1);
    std::nth_element(values.begin(), at, values.end(), std::greater<float>());
    return *at;
  }

  template <class Visit>
  void each_at_least(float bound, const Visit& visit) const {
    for (int64_t v = 0; v < padded_; v += kLanes) {
      if (any(load(z_ + v) >= splat(bound))) {
        for (int64_t u = v; u < std::min(v + kLanes, n_); ++u) {
          if (z_[u] >= bound) {
            visit(u);
          }
        }
      }
    }
  }

  // How far below the highest, in bins.
  Vec depth(Vec x) const { return (highest_ - x) * kPerUnit; }

  // Every vector with an entry that is kept, in order: which ones are, and e^(z - highest) or 0.
  template <class Visit>
  void each_vector(const Visit& visit) const {
    IVec lane;
    for (int i = 0; i < kLanes; ++i) {
      lane[i] = i;
    }
    for (int64_t v = 0; v < padded_; v += kLanes) {
      const Vec x = load(z_ + v);
      const IVec before_last = lane + static_cast<int32_t>(v) <= last_;
      const IVec kept = (x > limit_) | ((x == limit_) & before_last);
      if (any(kept)) {
        visit(v, x, kept, select(kept, exp(x - highest_), Vec{}));
      }
    }
  }

  const float* z_;
  const int64_t n_, padded_;
  const float highest_;
  // What is kept: entries above the limit, and those at it up to the last.
  float limit_ = -kInfinity;
  int32_t last_;
};

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

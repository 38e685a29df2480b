// Reverse scans on a CPU: one pass over the inputs, near memory speed.
//
// The recurrence of one segment is a serial chain, so kLanes segments ride in one vector. They are
// walked from their ends in blocks of kColumns tokens: the rows of a block are copied to a buffer,
// and each tile of kLanes segments x kLanes tokens is transposed in registers, walked from its last
// column to its first, transposed back, and copied out with its block, while the next one is
// prefetched.
//
//   segment 0             [part][ block 1 ][ block 0 ]|
//   segment 1   [part][ block 2 ][ block 1 ][ block 0 ]|      Lanes share nothing, so a segment's
//   segment 2                 [ block 1 ][ block 0 ]|         bits do not depend on its batch.
#include "scan.h"

#include <algorithm>

#include "pool.h"
// Sixteen segments would be read as more streams than the hardware prefetchers follow.
#define FASTRL_MAX_LANES 8
#include "simd.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// Tokens a row is read and written in one go: rows that are a power of two apart share a few sets
// of the cache, and would push each other out between one tile and the next.
constexpr int kColumns = 128;
// Below this many tokens waking a thread costs more than it saves.
constexpr int64_t kTokensPerThread = 32768;

struct Gae {
  static constexpr int kIn = 2, kOut = 2, kCarry = 2;
  const float* in[kIn];
  float* out[kOut];
  float gamma, gamma_lam;

  static void start(Vec bootstrap, Vec* carry) {
    carry[0] = bootstrap;  // the next value
    carry[1] = Vec{};      // the next advantage
  }
  void step(const Vec* x, Vec* carry, Vec* y) const {
    const Vec delta = x[0] + gamma * carry[0] - x[1];
    y[0] = delta + gamma_lam * carry[1];
    y[1] = y[0] + x[1];
    carry[0] = x[1];
    carry[1] = y[0];
  }
};

struct Returns {
  static constexpr int kIn = 1, kOut = 1, kCarry = 1;
  const float* in[kIn];
  float* out[kOut];
  float gamma;

  static void start(Vec bootstrap, Vec* carry) { carry[0] = bootstrap; }
  void step(const Vec* x, Vec* carry, Vec* y) const { y[0] = carry[0] = x[0] + gamma * carry[0]; }
};

struct Vtrace {
  static constexpr int kIn = 4, kOut = 2, kCarry = 3;
  const float* in[kIn];
  float* out[kOut];
  float gamma, gamma_lam, rho_bar, c_bar;

  static void start(Vec bootstrap, Vec* carry) {
    carry[0] = bootstrap;  // the next value
    carry[1] = bootstrap;  // the next target
    carry[2] = Vec{};      // the next target minus the next value
  }
  void step(const Vec* x, Vec* carry, Vec* y) const {
    const Vec ratio = exp(x[2] - x[3]);
    const Vec rho = at_most(ratio, splat(rho_bar)), c = at_most(ratio, splat(c_bar));
    const Vec delta = rho * (x[0] + gamma * carry[0] - x[1]);
    y[1] = rho * (x[0] + gamma * carry[1] - x[1]);
    carry[2] = delta + gamma_lam * c * carry[2];
    y[0] = carry[1] = carry[2] + x[1];
    carry[0] = x[1];
  }
};

// The kLanes segments that a task walks together, last token first, a block of columns at a time.
template <class Op>
class Group {
 public:
  Group(const Op& op, const Segments& at, int64_t first) : op_(op), mask_(at.mask) {
    float bootstrap[kLanes] = {};
    for (int i = 0; i < kLanes && first + i < at.segments; ++i) {
      const int64_t s = first + i;
      begin_[i] = at.offsets ? at.offsets[s] : s * at.length;
      end_[i] = at.offsets ? at.offsets[s + 1] : begin_[i] + at.length;
      bootstrap[i] = at.bootstrap ? at.bootstrap[s] : 0.0f;
      longest_ = std::max(longest_, end_[i] - begin_[i]);
    }
    Op::start(load(bootstrap), carry_);
  }

  void run() {
    for (int64_t walked = 0; walked < longest_; walked += kColumns) {
      fetch(walked);
      const int64_t first = kColumns - std::min<int64_t>(longest_ - walked, kColumns);
      for (int column = kColumns - kLanes; column > first - kLanes; column -= kLanes) {
        if (plain_ || all_valid(column)) {
          tile<true>(column);
        } else if (load_validity(column)) {
          tile<false>(column);
        } else {
          blank(column);
        }
      }
      flush();
    }
  }

 private:
  // The next block of each segment, on the right of its kColumns places; what is left of the
  // segment's begin is 0 and not valid.
  void fetch(int64_t walked) {
    plain_ = mask_ == nullptr;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t left = end_[i] - begin_[i] - walked;
      inside_[i] = static_cast<int>(std::clamp<int64_t>(left, 0, kColumns));
      at_[i] = begin_[i] + std::max<int64_t>(left - kColumns, 0);
      next_[i] = begin_[i] + std::max<int64_t>(left - 2 * kColumns, 0);
      plain_ = plain_ && inside_[i] == kColumns;
    }
    for (int i = 0; i < kLanes; ++i) {
      const int outside = kColumns - inside_[i];
      for (int a = 0; a < Op::kIn; ++a) {
        std::memset(block_[a][i], 0, outside * sizeof(float));
        std::memcpy(block_[a][i] + outside, op_.in[a] + at_[i], inside_[i] * sizeof(float));
      }
      if (!plain_) {
        std::memset(bytes_[i], 0, outside);
        if (mask_) {
          std::memcpy(bytes_[i] + outside, mask_ + at_[i], inside_[i]);
        } else {
          std::memset(bytes_[i] + outside, 1, inside_[i]);
        }
      }
    }
  }

  void flush() const {
    for (int i = 0; i < kLanes; ++i) {
      for (int b = 0; b < Op::kOut; ++b) {
        const float* from = block_[b][i] + kColumns - inside_[i];
        std::memcpy(op_.out[b] + at_[i], from, inside_[i] * sizeof(float));
      }
    }
  }

  bool all_valid(int column) const {
    uint8_t ones[kLanes];
    std::memset(ones, 1, kLanes);
    for (const auto& row : bytes_) {
      if (std::memcmp(row + column, ones, kLanes) != 0) {
        return false;
      }
    }
    return true;
  }

  // Which tokens of the tile are there and not masked; whether any is.
  bool load_validity(int column) {
    IVec any = {};
    for (int i = 0; i < kLanes; ++i) {
      int32_t lanes[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        lanes[j] = bytes_[i][column + j] ? -1 : 0;
      }
      std::memcpy(&valid_[i], lanes, sizeof lanes);
      any |= as_int(valid_[i]);
    }
    transpose(valid_);
    int32_t found = 0;
    for (int j = 0; j < kLanes; ++j) {
      found |= any[j];
    }
    return found != 0;
  }

  // The outputs take the place of the inputs, in registers and in the block.
  template <bool All>
  void tile(int column) {
    Vec x[Op::kIn][kLanes];
    for (int a = 0; a < Op::kIn; ++a) {
      for (int i = 0; i < kLanes; ++i) {
        x[a][i] = load(block_[a][i] + column);
        __builtin_prefetch(op_.in[a] + next_[i] + column, 0, 2);
      }
      transpose(x[a]);
    }
    for (int j = kLanes - 1; j >= 0; --j) {
      Vec in[Op::kIn], out[Op::kOut], next[Op::kCarry];
      for (int a = 0; a < Op::kIn; ++a) {
        in[a] = x[a][j];
      }
      std::copy(carry_, carry_ + Op::kCarry, next);
      op_.step(in, next, out);
      const IVec valid = as_int(valid_[j]);
      for (int c = 0; c < Op::kCarry; ++c) {
        carry_[c] = All ? next[c] : select(valid, next[c], carry_[c]);
      }
      for (int b = 0; b < Op::kOut; ++b) {
        x[b][j] = All ? out[b] : select(valid, out[b], Vec{});
      }
    }
    for (int b = 0; b < Op::kOut; ++b) {
      transpose(x[b]);
      for (int i = 0; i < kLanes; ++i) {
        __builtin_prefetch(op_.out[b] + next_[i] + column, 1, 2);
        store(block_[b][i] + column, x[b][i]);
      }
    }
  }

  void blank(int column) {
    for (int b = 0; b < Op::kOut; ++b) {
      for (int i = 0; i < kLanes; ++i) {
        store(block_[b][i] + column, Vec{});
      }
    }
  }

  static_assert(Op::kOut <= Op::kIn);
  const Op& op_;
  const uint8_t* mask_;
  int64_t begin_[kLanes] = {}, end_[kLanes] = {}, longest_ = 0;
  int64_t at_[kLanes];    // where the block's first token is in each segment
  int64_t next_[kLanes];  // and the next block's, which is on its way to the cache
  int inside_[kLanes];    // how many tokens of the block exist
  bool plain_;            // nothing masked, nothing outside: bytes_ is not filled
  Vec carry_[Op::kCarry], valid_[kLanes] = {};
  alignas(64) float block_[Op::kIn][kLanes][kColumns + 16];
  uint8_t bytes_[kLanes][kColumns];
};

template <class Op>
void scan(const Op& op, const Segments& at, int threads) {
  const int64_t tokens = at.offsets ? at.offsets[at.segments] : at.segments * at.length;
  const int64_t worth = tokens / kTokensPerThread + 1;
  parallel_for((at.segments + kLanes - 1) / kLanes,
               static_cast<int>(std::min<int64_t>(threads, worth)),
               [&](int64_t group) { Group<Op>(op, at, group * kLanes).run(); });
}

}  // namespace

void gae(const GaeArgs& a, int threads) {
  scan(Gae{{a.rewards, a.values}, {a.advantages, a.returns}, a.gamma, a.gamma_lam}, a.at, threads);
}

void returns(const ReturnsArgs& a, int threads) {
  scan(Returns{{a.rewards}, {a.returns}, a.gamma}, a.at, threads);
}

void vtrace(const VtraceArgs& a, int threads) {
  scan(Vtrace{{a.rewards, a.values, a.logprobs, a.old_logprobs},
              {a.targets, a.advantages},
              a.gamma,
              a.gamma_lam,
              a.rho_bar,
              a.c_bar},
       a.at, threads);
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

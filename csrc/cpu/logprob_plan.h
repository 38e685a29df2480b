// How the backward of the lm-head's log-probs on a CPU goes, which its forward has to know: that
// leaves exponentials in what memory there is besides. In the namespace of the instruction set.
#pragma once

#include "running.h"
#include "weight_sums.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kMostTogether = 8;  // chunks: what a large workspace has beyond keeps more
constexpr int64_t kFew = 64;  // tokens; with more, a product of its own for each gradient is faster

struct Plan {
  int64_t capacity, padded;  // tokens at a time, and these as whole panels
  int64_t range;             // tokens of which G is there by row, in whole panels
  int64_t g_stride;          // of a row of G: a line more, or rows share few cache sets
  int64_t columns;           // H as whole panels
  int64_t chunk;             // vocabulary rows whose product is summed from zero
  int64_t together;          // chunks at a time
  int64_t rows_alone;        // of the vocabulary at a time, for grad_weight alone
  int64_t panels;            // of all tokens
  int64_t kept_lanes;        // of a panel
  int64_t kept_panels;       // of a block of the vocabulary, the first ones
  int64_t kept_stride;       // bytes from block to block
  int64_t kept_blocks;       // of the vocabulary
  bool few;                  // tokens for walk_few
  bool one_walk;             // grad_hidden and grad_weight together
  bool fits;                 // all sums in the workspace
  bool exact;                // exponentials are not rounded as if they had been kept

  template <class Kind>
  KeptBlock<Kind> kept_block(void* kept, int64_t v0, int64_t panel) const {
    const int64_t block = v0 / kBlock;
    if (block >= kept_blocks || panel >= kept_panels) {
      return {};
    }
    char* const at = static_cast<char*>(kept) + block * kept_stride;
    return {at + panel * KeptBlock<Kind>::size(kept_lanes), kept_lanes};
  }
};

template <class Kind>
Plan make_plan(const LinearArgs& a, const Workspace& workspace, int64_t capacity) {
  Plan plan;
  plan.capacity = capacity;
  plan.padded = round_up(plan.capacity, kPanel);
  // Tiles go on with sums; others add a range's, and ranges are what rounds would be.
  const int64_t of_tiles = ceil_div(plan.padded, ceil_div(plan.padded, kTokens));
  plan.range = round_up(Made<Kind>::kTiles ? of_tiles : tokens_of_round<Kind>(a), kPanel);
  plan.g_stride = plan.range + 16 * Kind::kStep;
  plan.columns = round_up(a.width, kPanel);
  plan.chunk = std::min(rows_together(a.width), round_up(a.vocab, kBlock));
  plan.panels = ceil_div(a.rows, kPanel);

  const bool several = a.rows > plan.capacity, floats = a.hidden_type == Float::f32;
  plan.few = Kind::kStep == 1 && a.rows <= kFew && !several;
  const int64_t all_sums = floats ? 0 : 4 * a.rows * plan.columns;
  // G by row is one block's for each thread: as much as a chunk's for 8 or 16 of them. What more
  // threads take is not counted, as forward and backward may have other numbers of them.
  const int64_t by_row = 4 * plan.g_stride / Kind::kStep;
  const int64_t of_row =
      WeightSums<Kind>::size(a, plan.padded, 1) + (a.rows > plan.range ? 4 * plan.columns : 0);
  int64_t packed = 8 * plan.padded * plan.columns / Kind::kStep;
  const int64_t rounds_sums = floats ? 0 : 4 * plan.capacity * plan.columns;
  if (Made<Kind>::kTiles) {
    constexpr int64_t kLeast = 2 * kBlock;
    const auto fit = [&](int64_t sums) {
      return (workspace.limit - packed - sums) / (by_row + of_row) / kLeast * kLeast;
    };
    const int64_t most = fit(all_sums) > 0 ? fit(all_sums) : std::max(fit(rounds_sums), kLeast);
    plan.chunk = std::min(plan.chunk, most);
  }
  const int64_t of_chunk = plan.chunk * of_row;
  packed += plan.chunk * by_row;
  int64_t scratch = packed + (plan.few ? std::max(of_chunk, kFewSums) : of_chunk);
  plan.fits = scratch + all_sums <= workspace.limit;
  plan.one_walk = plan.fits || !several;
  const int64_t sums = plan.one_walk ? all_sums : rounds_sums;

  const int64_t free = std::max<int64_t>(workspace.limit - scratch - sums, 0);
  const int64_t share = several ? free : free / 3;  // of many tokens few would be kept
  plan.together = std::min({1 + share / of_chunk, kMostTogether, ceil_div(a.vocab, plan.chunk)});
  scratch += (plan.together - 1) * of_chunk;
  plan.kept_lanes = plan.panels > 1 ? kPanel : kLanes * vectors_of(a.rows);
  const int64_t size = KeptBlock<Kind>::size(plan.kept_lanes);
  if (workspace.in_gradient) {
    plan.kept_stride = kBlock * a.width * bytes(a.weight_type);
    plan.kept_panels = std::min(plan.panels, plan.kept_stride / size);
    plan.kept_blocks = a.vocab / kBlock;
  } else {
    const int64_t left = std::min(workspace.limit - scratch - sums, workspace.kept_bytes);
    plan.kept_stride = plan.panels * size;
    plan.kept_panels = plan.panels;
    plan.kept_blocks = std::max<int64_t>(left, 0) / plan.kept_stride;
    plan.kept_blocks = std::min(plan.kept_blocks, ceil_div(a.vocab, kBlock));
  }
  // A cap's derivative wants the logits, a bias float sums over the tokens.
  plan.exact = a.softcap > 0.0f || a.bias;
  plan.kept_blocks = plan.exact ? 0 : plan.kept_blocks;

  plan.rows_alone = plan.together * plan.chunk;
  if (several) {
    const int64_t kept = workspace.in_gradient ? 0 : plan.kept_blocks * plan.kept_stride;
    const int64_t fit = (workspace.limit - kept - packed) / (4 * plan.columns) / kBlock * kBlock;
    plan.rows_alone = std::clamp(fit, plan.chunk, round_up(a.vocab, kBlock));
  }
  return plan;
}

// All tokens in one round, if there is room, or in several.
template <class Kind>
Plan make_plan(const LinearArgs& a, const Workspace& workspace) {
  const Plan plan = make_plan<Kind>(a, workspace, tokens_at_once<Kind>(a));
  return plan.fits ? plan : make_plan<Kind>(a, workspace, tokens_of_round<Kind>(a));
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

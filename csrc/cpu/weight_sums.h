// Sums of the weight's rows, sum_v g[v][t] weight[v] for each token t: the gradient of hidden, and
// the means that it is made of where the forward sums them. They grow a chunk of the vocabulary at
// a time, in order: a chunk's product is summed from zero, then added. Several chunks are kept and
// then multiplied at once, or threads would wait for each other after every one. In the namespace
// of the instruction set.
#pragma once

#include "few_backward.h"
#include "linear.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int64_t kFewSums = 8 << 20;  // bytes of few tokens' sums of chunks

inline void add(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] += from[i];
  }
}

// Rows of 16-bit numbers: sixteen lie `stride` apart, the next sixteen `sixteen` behind them.
struct Halves {
  uint16_t* data;
  int64_t stride, sixteen;
  uint16_t* row(int64_t r) const { return data + r / 16 * sixteen + r % 16 * stride; }
};

// What tokens are as the depth of a product is whole steps of it: of a tile, no less.
template <class Kind>
constexpr int64_t kDepthOfTokens = Made<Kind>::kTiles ? kPanel : Kind::kStep;

// n rows of G, rounded to bf16; 0 in the lanes of a vector, or of a tile's depth, that are no
// token's.
template <class Kind>
void round_rows(float* z, int n, int64_t tokens, const Halves& to) {
  for (int64_t at = 0; at < round_up(tokens, kDepthOfTokens<Kind>); at += kLanes) {
    for (int r = 0; tokens - at < kLanes && r < n; ++r) {
      std::fill(z + r * kPanel + std::max(tokens, at), z + r * kPanel + at + kLanes, 0.0f);
    }
    for (int r = 0; r < n; ++r) {
      Kind::keep(load(z + r * kPanel + at), to.row(r) + at);
    }
  }
}

// Sums that tiles go on with where they lie: [H / kPanel][tokens][kPanel].
struct PanelSums {
  float* data;
  int64_t tokens;  // a multiple of 16
  float* at(int64_t h, int64_t t) const { return data + (h / kPanel * tokens + t) * kPanel; }
};

// G of some chunks, and their rows of the weight, as the products read them.
template <class Kind>
class WeightSums {
 public:
  using Element = typename Kind::Element;

  // Of at most `padded` tokens (whole panels), `chunks` at a time of `chunk` rows each.
  WeightSums(const LinearArgs& a, int64_t padded, int64_t chunk, int64_t chunks)
      : a_(a),
        padded_(padded),
        chunk_(chunk),
        columns_(round_up(a.width, kPanel)),
        g_{chunk / Kind::kStep},
        by_token_(chunks * chunk / Kind::kStep * padded),
        weight_(chunks * chunk / Kind::kStep * columns_) {}

  // Bytes that each chunk takes.
  static int64_t size(const LinearArgs& a, int64_t padded, int64_t chunk) {
    return 4 * chunk / Kind::kStep * (padded + round_up(a.width, kPanel));
  }

  // A block of G: n rows from row `in_chunk` of chunk c, of the panel p with `tokens` tokens; as it
  // is, rows kPanel apart, or rounded to bf16. Read across, its rows would be a cache
  // line, and a page, for each number, so it is turned.
  void keep(int64_t c, int64_t in_chunk, int n, int64_t p, int64_t tokens, const float* z) const {
    static_assert(kBlock % kLanes == 0, "what a tile has beyond the rows is the block's own");
    for (int64_t at = 0; at < tokens; at += kLanes) {
      float* to = of_chunk(c) + g_.at(p * kPanel + at, in_chunk);
      for (int r0 = 0; r0 < n; r0 += kLanes) {
        Vec tile[kLanes] = {};
        for (int i = 0; i < std::min(kLanes, n - r0); ++i) {
          tile[i] = load(z + (r0 + i) * kPanel + at);
        }
        transpose(tile);
        for (int i = 0; i < kLanes; ++i) {
          store(to + i * chunk_ + r0, tile[i]);
        }
      }
    }
  }

  void keep(int64_t c, int64_t in_chunk, int n, int64_t p, int64_t tokens,
            const Halves& halves) const {
    const uint16_t nothing[kLanes] = {};
    for (int64_t at = 0; at < tokens; at += kLanes) {
      for (int r0 = 0; r0 < n; r0 += 2 * kLanes) {
        const int rows = std::min(n - r0, 2 * kLanes);
        Vec pairs[kLanes] = {};  // of neighbouring rows, a token per lane
        for (int r = 0; r < rows; r += 2) {
          const uint16_t* even = halves.row(r0 + r) + at;
          pairs[r / 2] = Kind::pairs(even, r + 1 < rows ? even + halves.stride : nothing);
        }
        transpose(pairs);
        for (int i = 0; i < kLanes; ++i) {
          Element* to = of_chunk(c) + g_.at(p * kPanel + at + i, (in_chunk + r0) / 2);
          if (kBlock - r0 >= 2 * kLanes) {
            store(reinterpret_cast<float*>(to), pairs[i]);
          } else {  // the next block's are behind
            std::memcpy(to, &pairs[i], kBlock % (2 * kLanes) / 2 * sizeof(Element));
          }
        }
      }
    }
  }

  // n rows of the weight from row `in_chunk` of chunk c, which starts at row `first`.
  void pack(int64_t c, int64_t first, int64_t in_chunk, int n) const {
    const auto* from =
        static_cast<const char*>(a_.weight) + first * a_.weight_stride * bytes(a_.weight_type);
    pack_rows(Kind(), from, a_.weight_stride, a_.weight_type, in_chunk, n, a_.width, chunk_,
              weight(c));
  }

  // sums(t) [H], for t below `count`, or PanelSums += the products of G and the weight of the first
  // chunks, which have `rows` rows in all.
  template <class Sums>
  void add_products(int64_t rows, int64_t count, int threads, Sums sums) const {
    // A few panels of the weight stay in L2 while G passes by; or one, and all of a small G.
    const int64_t blocks = ceil_div(count, kBlock), chunks = ceil_div(rows, chunk_);
    const int64_t of_panel = kPanel * chunk_ / Kind::kStep * sizeof(Element);
    const int64_t most = Made<Kind>::kTiles ? (3 << 18) / of_panel * kPanel : 4 * 64;
    const int64_t wide = round_up(ceil_div(a_.width, ceil_div(a_.width, most)), kPanel);
    const int64_t width = blocks > 8 ? wide : 64, groups = ceil_div(a_.width, width);
    const int64_t tasks = Made<Kind>::kTiles
                              ? std::max<int64_t>(4 * threads, groups * ceil_div(blocks, kTogether))
                              : 4 * threads * chunks;
    const int64_t ranges = std::min(blocks, ceil_div(tasks, groups));
    parallel_for(groups * ranges, threads, [&](int64_t task) {
      const int64_t h0 = task / ranges * width, range = task % ranges;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t of_chunk = std::min(chunk_, rows - c * chunk_);
        const int64_t end = std::min((range + 1) * blocks / ranges * kBlock, count);
        for (int64_t t = range * blocks / ranges * kBlock; t < end; t += kTogether * kBlock) {
          const int64_t n = std::min(kTogether * kBlock, end - t);
          add_blocks(c, of_chunk, t, n, h0, std::min(h0 + width, a_.width), sums);
        }
      }
    });
  }

 private:
  // Blocks of tokens that stay in L2 while panels of the weight meet them.
  static constexpr int64_t kTogether = Made<Kind>::kTiles ? 4 : 1;

  Element* of_chunk(int64_t c) const { return by_token_.get() + c * padded_ * g_.steps; }

  Element* weight(int64_t c) const { return weight_.get() + c * chunk_ / Kind::kStep * columns_; }

  // n tokens from t0 on, columns [h0, h1).
  template <class Sums>
  void add_blocks(int64_t chunk, int64_t rows_of_chunk, int64_t t0, int64_t n, int64_t h0,
                  int64_t h1, Sums sums) const {
    Rows blocks[kTogether];
    for (int64_t t = 0; t < n; t += kBlock) {
      const int of_block = static_cast<int>(std::min<int64_t>(kBlock, n - t));
      blocks[t / kBlock] = g_.rows(of_chunk(chunk), t0 + t, of_block);
    }
    constexpr bool kOnto = std::is_same_v<Sums, PanelSums>;
    const int64_t steps = ceil_div(rows_of_chunk, Kind::kStep);
    Buffer<float> c(kOnto ? 0 : round_up(n, kBlock) * kPanel);
    for (int64_t h = h0; h < h1; h += kPanel) {
      const Element* panel = weight(chunk) + h * chunk_ / Kind::kStep;
      if constexpr (kOnto) {
        const int64_t next = h + kPanel < h1 ? n * kPanel * 4 : 0;
        Fetching fetching(reinterpret_cast<const char*>(sums.at(h + kPanel, t0)), next,
                          tile_steps(n, steps));
        multiply_beside(Kind(), blocks, n, steps, panel, kVectors, sums.at(h, t0), fetching, true);
      } else {
        multiply_blocks<Kind>(blocks, n, steps, panel, kVectors, c.get());
        for (int64_t r = 0; r < n; ++r) {
          add(c.get() + r * kPanel, std::min<int64_t>(kPanel, h1 - h), sums(t0 + r) + h);
        }
      }
    }
  }

  const LinearArgs& a_;
  const int64_t padded_, chunk_, columns_;
  const Made<Kind> g_;
  Buffer<Element> by_token_;  // G [chunks], each [tokens, chunk]
  Buffer<Element> weight_;    // [chunks], each in panels of `chunk` rows
};

// Whether a thread can take chunks of its own, of the vocabulary and of what their sums may take.
inline bool enough_chunks(const LinearArgs& a, int64_t chunks, bool sums, int threads) {
  return (threads == 1 || chunks >= 2 * threads) &&
         (!sums || 4 * threads * a.rows * round_up(a.width, kPanel) <= kFewSums);
}

// The sums with few tokens, where a thread takes a whole chunk: task(c, all) leaves the sums of
// chunk c in panels, as pack_token packs.
template <class Task, class Sums>
void sum_chunks(const LinearArgs& a, int64_t chunks, int threads, Task task, Sums sums) {
  const int64_t columns = round_up(a.width, kPanel), size = a.rows * columns;
  const int64_t together = std::min(kFewSums / 4 / size / threads * threads, chunks);
  Buffer<float> of_chunks(together * size);
  for (int64_t c0 = 0; c0 < chunks; c0 += together) {
    const int64_t count = std::min(together, chunks - c0);
    parallel_for(count, threads, [&](int64_t i) { task(c0 + i, of_chunks.get() + i * size); });
    parallel_for(columns / kAcross, threads, [&](int64_t p) {
      const int64_t width = std::min<int64_t>(kAcross, a.width - p * kAcross);
      for (int64_t i = 0; i < count * a.rows; ++i) {
        const int64_t t = i % a.rows;
        add(of_chunks.get() + i / a.rows * size + (p * a.rows + t) * kAcross, width,
            sums(t) + p * kAcross);
      }
    });
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

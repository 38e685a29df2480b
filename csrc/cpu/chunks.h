// A chunk of a segment's keys and values as operands of products with panels of queries.
#pragma once

#include "pack.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

// As floats, wherever they lie if they are stored so.
class FloatChunk {
 public:
  FloatChunk(Float type, int64_t width, int64_t most_keys)
      : type_(type), width_(width), copy_(type == Float::f32 ? 0 : 2 * most_keys * width) {}

  // Keys and values [n, D], one behind the other.
  void take(const char* keys, const char* values, int64_t n) {
    n_ = n;
    keys_ = as_floats(keys, copy_.get());
    values_ = as_floats(values, copy_.get() + n * width_);
  }

  // z[n, kPanel] = K * queries [D, kPanel]
  void score(const float* queries, int vectors, float* z) const {
    multiply_rows(keys_, width_, 1, n_, width_, queries, vectors, z);
  }

  // out[D, kPanel] = V^T * weights [n, kPanel]
  void weigh(const float* weights, int vectors, float* out) const {
    multiply_rows(values_, 1, width_, width_, n_, weights, vectors, out);
  }

 private:
  const float* as_floats(const char* from, float* to) const {
    if (type_ == Float::f32) {
      return reinterpret_cast<const float*>(from);
    }
    to_floats(from, type_, n_ * width_, to);
    return to;
  }

  // c[n, kPanel] = A[n x depth] * b, element (i, k) of A at a[i * row + k * step].
  static void multiply_rows(const float* a, int64_t row, int64_t step, int64_t n, int64_t depth,
                            const float* b, int vectors, float* c) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(a);
    rows.stride = step * 4;
    for (int64_t i = 0; i < n; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, n - i));
      for (int r = 0; r < round_up(count, kMostRows); ++r) {
        rows.row[r] = (i + std::min(r, count - 1)) * row * 4;
      }
      multiply<Floats>(rows, count, depth, b, vectors, c + i * kPanel);
    }
  }

  const Float type_;
  const int64_t width_;
  const Buffer<float> copy_;
  int64_t n_ = 0;
  const float *keys_ = nullptr, *values_ = nullptr;
};

#ifdef FASTRL_TILES

// In bf16, in AMX's tiles: queries and weights are rounded as well. Behind rows and depth lie
// zeros.
class TileChunk {
 public:
  TileChunk(int64_t width, int64_t most_keys)
      : width_(width),
        keys_(round_up(most_keys, 16) * depth()),
        values_(round_up(width, 16) * round_up(most_keys, 32) / 2),
        panel_(std::max(depth(), round_up(most_keys, 32) / 2) * kPanel) {}

  void take(const char* keys, const char* values, int64_t n) {
    n_ = n;
    take_keys(reinterpret_cast<const uint16_t*>(keys));
    take_values(reinterpret_cast<const uint16_t*>(values));
  }

  void score(const float* queries, int vectors, float* z) const {
    pack(queries, width_, vectors);
    multiply(keys_.get(), n_, depth(), vectors, z);
  }

  void weigh(const float* weights, int vectors, float* out) const {
    pack(weights, n_, vectors);
    multiply(values_.get(), width_, steps(), vectors, out);
  }

 private:
  // Pairs in depth: of features, and of keys.
  int64_t depth() const { return round_up(width_, 32) / 2; }
  int64_t steps() const { return round_up(n_, 32) / 2; }

  void take_keys(const uint16_t* from) {
    const Made<Pairs> made{depth()};
    for (int64_t key = 0; key < round_up(n_, 16); ++key) {
      for (int64_t d = 0; d < 2 * depth(); d += 32) {
        uint16_t line[32] = {};
        if (key < n_) {
          std::memcpy(line, from + key * width_ + d, std::min<int64_t>(32, width_ - d) * 2);
        }
        std::memcpy(keys_.get() + made.at(key, d / 2), line, sizeof line);
      }
    }
  }

  // Pairs of neighbouring keys, transposed.
  void take_values(const uint16_t* from) {
    const Made<Pairs> made{steps()};
    for (int64_t d = 0; d < width_; d += 16) {
      const int64_t size = std::min<int64_t>(16, width_ - d) * 2;
      for (int64_t k = 0; k < 2 * steps(); k += 32) {
        alignas(64) uint32_t words[16][16];
        for (int64_t i = 0; i < 16; ++i) {
          alignas(32) uint16_t two[2][16] = {};
          for (int64_t j = 0; j < std::min<int64_t>(2, n_ - k - 2 * i); ++j) {
            std::memcpy(two[j], from + (k + 2 * i + j) * width_ + d, size);
          }
          const Vec pairs = Pairs::pairs(two[0], two[1]);
          std::memcpy(words[i], &pairs, sizeof pairs);
        }
        transpose_words(words, 16, 16, 16, values_.get() + made.at(d, k / 2), 16);
      }
    }
  }

  // [n, kPanel] floats as pairs of rows, in the panel.
  void pack(const float* from, int64_t n, int vectors) const {
    for (int64_t k = 0; k < round_up(n, 32); k += 2) {
      for (int j = 0; j < vectors * kLanes; j += kLanes) {
        uint16_t even[kLanes] = {}, odd[kLanes] = {};
        if (k < n) {
          Pairs::keep(load(from + k * kPanel + j), even);
        }
        if (k + 1 < n) {
          Pairs::keep(load(from + (k + 1) * kPanel + j), odd);
        }
        const Vec pairs = Pairs::pairs(even, odd);
        std::memcpy(panel_.get() + k / 2 * kPanel + j, &pairs, sizeof pairs);
      }
    }
  }

  // c[n, kPanel] = A * the panel
  void multiply(const uint32_t* a, int64_t n, int64_t steps, int vectors, float* c) const {
    const Made<Pairs> made{steps};
    for (int64_t i = 0; i < n; i += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, n - i));
      FASTRL_ISA::multiply<Pairs>(made.rows(a, i, count), count, steps, panel_.get(), vectors,
                                  c + i * kPanel);
    }
  }

  const int64_t width_;
  int64_t n_ = 0;
  const Buffer<uint32_t> keys_, values_;  // [keys, depth()] and [D, steps()], in tiles
  const Buffer<uint32_t> panel_;
};

#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

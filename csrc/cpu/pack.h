// Scratch memory, and rows packed for the products of gemm.h.
#pragma once

#include <cstdlib>
#include <new>

#include "convert.h"
#include "gemm.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Memory that nobody has written, on a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 0) : data_(allocate(n)) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static T* allocate(int64_t n) {
    if (n <= 0) {
      return nullptr;
    }
    void* memory = std::aligned_alloc(64, round_up(n * sizeof(T), 64));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    return static_cast<T*>(memory);
  }
  T* data_;
};

// to[w * to_stride + r] = from[r * stride + w] for 32-bit words. `from` can be read, and a row of
// `to` written, up to a multiple of kLanes.
inline void transpose_words(const void* from, int64_t stride, int64_t rows, int64_t words, void* to,
                            int64_t to_stride) {
  const auto* source = static_cast<const float*>(from);
  auto* target = static_cast<float*>(to);
  for (int64_t w = 0; w < words; w += kLanes) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      Vec tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        tile[i] = load(source + (r + i) * stride + w);
      }
      transpose(tile);
      for (int i = 0; i < std::min<int64_t>(kLanes, words - w); ++i) {
        store(target + (w + i) * to_stride + r, tile[i]);
      }
    }
  }
}

// Row r of what is made, of tiles: `count` Elements that lie one behind the other.
template <class Kind>
inline void copy_to_tiles(const Made<Kind>& made, int64_t r, const void* from, int64_t count,
                          typename Kind::Element* to) {
  const auto* row = static_cast<const float*>(from);
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) {
    store(reinterpret_cast<float*>(to + made.at(r, k)), load(row + k));
  }
  std::memcpy(to + made.at(r, k), row + k, (count - k) * sizeof *to);
}

// Interleaves kStep neighbouring rows and cuts them into panels of columns, so that rows become the
// depth of a product:  [panel][row / kStep][kPanel] Elements. Missing rows and columns are 0. Row r
// lies at index[r], if there is an index.
inline void pack_rows(Floats, const char* from, int64_t stride, Float type, int64_t first,
                      int64_t rows, int64_t width, int64_t depth, float* to,
                      const int64_t* index = nullptr) {
  for (int64_t r = first; r < first + rows; ++r) {
    const int64_t row = (index ? index[r] : r) * stride;
    for (int64_t h = 0; h < width; h += kPanel) {
      float* panel = to + h * depth + r * kPanel;
      const int64_t n = std::min<int64_t>(kPanel, width - h);
      to_floats(from + (row + h) * bytes(type), type, n, panel);
      std::fill(panel + n, panel + kPanel, 0.0f);
    }
  }
}

#ifdef FASTRL_PAIRS
inline void pack_rows(Pairs, const char* from, int64_t stride, Float, int64_t first, int64_t rows,
                      int64_t width, int64_t depth, uint32_t* to, const int64_t* index = nullptr) {
  const auto* data = reinterpret_cast<const uint16_t*>(from);
  for (int64_t r = first; r < first + rows; r += 2) {
    const bool two = r + 1 < first + rows;
    const auto* even = data + (index ? index[r] : r) * stride;
    const auto* odd = two ? data + (index ? index[r + 1] : r + 1) * stride : nullptr;
    for (int64_t h = 0; h < width; h += kPanel) {
      uint32_t* panel = to + h * (depth / 2) + r / 2 * kPanel;
      const int64_t n = std::min<int64_t>(kPanel, width - h);
      for (int64_t i = 0; i < n; ++i) {
        panel[i] = even[h + i] | (odd ? static_cast<uint32_t>(odd[h + i]) << 16 : 0);
      }
      std::fill(panel + n, panel + kPanel, 0u);
    }
  }
}
#endif

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

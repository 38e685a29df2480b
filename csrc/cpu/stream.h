// Products of gemm.h, bit for bit, with rows of A that lie evenly: weights, read from memory once.
// Three rows are then reached from one address, and what comes next is asked for ahead of time.
// Rows of 16-bit numbers become floats on the way, a few at a time, where the nearest cache holds
// them. Compiled once for all files of an instruction set, in stream.cpp.
#pragma once

#include <type_traits>

#include "float.h"
#include "gemm.h"

namespace fastrl {
namespace FASTRL_ISA {

// Rows lie `stride` bytes apart and are contiguous in depth.
struct EvenRows {
  const char* data;
  int64_t stride;
};

// A panel of some vectors, whose steps of depth are `columns` Elements apart. Where there are fewer
// than kPanel, the slices that a product takes still fill the caches evenly.
template <class Element>
struct PanelView {
  const Element* data;
  int64_t columns;
  int vectors;
  int64_t tokens = kPanel;  // in the columns, at most; who says fewer takes few.h's products
};

// C[rows x kPanel] = A * panel, for at most kBlock rows of `type`, with the bits of multiply. Rows
// beyond the last one are not read, nor written but by tiles.
void stream_floats(const EvenRows& a, Float type, int rows, int64_t steps,
                   const PanelView<float>& panel, float* c);
#ifdef FASTRL_PAIRS
void stream_pairs(const EvenRows& a, Float type, int rows, int64_t steps,
                  const PanelView<uint32_t>& panel, float* c);
void stream_unpaired_floats(const EvenRows& a, Float type, int rows, int64_t steps,
                            const PanelView<uint32_t>& panel, float* c);
#endif
// Of int8, as words; the sums are int32, whose bits c holds.
void stream_words(const EvenRows& a, int rows, int64_t steps, const PanelView<uint32_t>& panel,
                  float* c);

namespace {

#ifdef FASTRL_TILES
// So few rows at a time that they are read from end to end; `onto` what C has.
template <class Kind>
void stream_tiles(const EvenRows& a, int rows, int64_t steps, const PanelView<uint32_t>& panel,
                  typename Kind::Sum* c, bool onto = false) {
  constexpr int kTogether = 32;
  Nothing nothing;
  for (int r0 = 0; r0 < rows; r0 += kTogether) {
    const int n = std::min(kTogether, rows - r0);
    Rows some;
    some.data = a.data + r0 * a.stride;
    some.stride = 4;
    for (int r = 0; r < kBlock; ++r) {
      some.row[r] = std::min(r, n - 1) * a.stride;
    }
    multiply_beside(Kind(), &some, n, steps, panel.data, panel.vectors, c + r0 * kPanel, nothing,
                    onto);
  }
}
#endif

template <class Kind>
inline void multiply_streamed(const EvenRows& a, Float type, int rows, int64_t steps,
                              const PanelView<typename Kind::Element>& panel, float* c) {
  if constexpr (std::is_same_v<Kind, Floats>) {
    stream_floats(a, type, rows, steps, panel, c);
  }
#ifdef FASTRL_PAIRS
  if constexpr (std::is_same_v<Kind, Pairs>) {
    stream_pairs(a, type, rows, steps, panel, c);
  }
  if constexpr (std::is_same_v<Kind, UnpairedFloats>) {
    stream_unpaired_floats(a, type, rows, steps, panel, c);
  }
#endif
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

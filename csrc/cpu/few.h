// Products of gemm.h, bit for bit, with no more tokens than a vector has lanes: weights read from
// memory once. With tokens in lanes, and few of them, each weight is loaded and broadcast for
// little. Where the sums of all fit in registers, rows of weights ride in lanes instead: 16 of them
// are turned in registers and meet a token's number, broadcast, before they leave these. 16-bit
// weights turn in pairs. Compiled once, in few.cpp.
#pragma once

#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int kFewest = kLanes == 16 ? 8 : 4;  // tokens whose sums fit in registers

static_assert(kPanel > kFewest, "a panel that does not say is one of many");

// Columns of a panel of `tokens` that multiply_few reads: those that there is a product for.
inline int columns_of_few(int64_t tokens, Float type) {
  const int most = type == Float::bf16 ? kFewest / 2 : kFewest;  // half the bytes to wait for
  int columns = 1;
  while (columns < tokens) {
    columns *= 2;
  }
  return columns <= most ? columns : kLanes;
}

}  // namespace

// C[rows x kPanel] = A * panel for at most kBlock rows of `type` and a panel of one vector. Of C
// whole vectors of rows are written.
void multiply_few(const EvenRows& a, Float type, int rows, int64_t steps,
                  const PanelView<float>& panel, float* c);

}  // namespace FASTRL_ISA
}  // namespace fastrl

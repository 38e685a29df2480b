// What this machine's cores and memory can do at most, on the instruction set in use. Benchmarks
// say how much of it an op reaches.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "isa.h"

namespace fastrl {

// Names and values in 1e9 operations (a multiplication and an addition are two) or bytes a second.
using Figures = std::vector<std::pair<std::string, double>>;

// Takes about `seconds` for each figure and, for memory, 1 GB.
#define FASTRL_DECLARE_PEAK(isa)             \
  namespace isa {                            \
  Figures peak(int threads, double seconds); \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_PEAK)

}  // namespace fastrl

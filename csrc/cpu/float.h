// The types that tensors come in.
#pragma once

#include <cstdint>

namespace fastrl {

enum class Float { f32, bf16, f16 };

// Of the rows of an int8 weight, which zeros fill up to a multiple of 64: what 1 stands for, and
// the sum of their integers. Null where a weight is of floats.
struct Int8Rows {
  const float* scale;
  const int32_t* sum;
};

}  // namespace fastrl

// Quantized weights on a GPU; the arguments are those of the CPU. Returns a cudaError_t, 0 for
// success.
#pragma once

#include "../cpu/quant.h"

namespace fastrl {
namespace cuda {

// 4-bit weights alone: what is stored in 8 bits is one product, and the caller's.
int dequantize(const DequantizeArgs& args, void* stream);

}  // namespace cuda
}  // namespace fastrl

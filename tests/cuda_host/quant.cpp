// csrc/cuda/quant.cu for the host, with a name that ctypes can find.
#include "../../csrc/cuda/quant.cu"

extern "C" {
int dequantize(const fastrl::DequantizeArgs* a) { return fastrl::cuda::dequantize(*a, nullptr); }
}

#include "error.h"

#include <cuda_runtime.h>

namespace fastrl {
namespace cuda {

std::string error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace cuda
}  // namespace fastrl

// Reverse scans on a GPU; the arguments are those of the CPU. Each returns a cudaError_t, 0 for
// success.
#pragma once

#include "../cpu/scan.h"

namespace fastrl {
namespace cuda {

int gae(const GaeArgs& args, void* stream);
int returns(const ReturnsArgs& args, void* stream);
int vtrace(const VtraceArgs& args, void* stream);

}  // namespace cuda
}  // namespace fastrl

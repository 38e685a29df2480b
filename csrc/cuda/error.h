#pragma once

#include <string>

namespace fastrl {
namespace cuda {

// The CUDA runtime's own words for an error code that a launcher returned.
std::string error_text(int code);

}  // namespace cuda
}  // namespace fastrl

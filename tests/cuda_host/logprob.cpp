// csrc/cuda/logprob.cu for the host, with names that ctypes can find.
#include "../../csrc/cuda/logprob.cu"

extern "C" {
int fold(const fastrl::LogprobFoldArgs* a) {
  return fastrl::cuda::linear_logprob_fold(*a, nullptr);
}
int gradient(const fastrl::LogprobGradientArgs* a) {
  return fastrl::cuda::linear_logprob_gradient(*a, nullptr);
}
}

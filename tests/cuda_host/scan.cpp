// csrc/cuda/scan.cu for the host, with names that ctypes can find.
#include "../../csrc/cuda/scan.cu"

extern "C" {
int gae(const fastrl::GaeArgs* a) { return fastrl::cuda::gae(*a, nullptr); }
int discounted_returns(const fastrl::ReturnsArgs* a) { return fastrl::cuda::returns(*a, nullptr); }
int vtrace(const fastrl::VtraceArgs* a) { return fastrl::cuda::vtrace(*a, nullptr); }
}

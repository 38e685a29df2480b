// The ops of cpu/scan.h and cuda/scan.h for Python; kernels/scan/op.py has checked what comes in.
#include "bindings.h"
#include "cpu/scan.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/scan.h"
#endif

namespace py = pybind11;

namespace fastrl {
namespace {

Segments segments(int64_t count, int64_t length, Address offsets, Address mask, Address bootstrap) {
  return {count, length, pointer<const int32_t>(offsets), pointer<const uint8_t>(mask),
          pointer<const float>(bootstrap)};
}

void gae_cpu(const GaeArgs& args, int threads) { FASTRL_DISPATCH(gae, args, threads) }
void returns_cpu(const ReturnsArgs& args, int threads) { FASTRL_DISPATCH(returns, args, threads) }
void vtrace_cpu(const VtraceArgs& args, int threads) { FASTRL_DISPATCH(vtrace, args, threads) }

}  // namespace

void bind_scan(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Segments>(m, "Segments").def(py::init(&segments));
  py::class_<GaeArgs>(m, "gae_args")
      .def(py::init([](const Segments& at, Address rewards, Address values, Address advantages,
                       Address returns, float gamma, float gamma_lam) {
        return GaeArgs{at,
                       pointer<const float>(rewards),
                       pointer<const float>(values),
                       pointer<float>(advantages),
                       pointer<float>(returns),
                       gamma,
                       gamma_lam};
      }));
  py::class_<ReturnsArgs>(m, "discounted_returns_args")
      .def(py::init([](const Segments& at, Address rewards, Address returns, float gamma) {
        return ReturnsArgs{at, pointer<const float>(rewards), pointer<float>(returns), gamma};
      }));
  py::class_<VtraceArgs>(m, "vtrace_args")
      .def(py::init([](const Segments& at, Address rewards, Address values, Address logprobs,
                       Address old_logprobs, Address targets, Address advantages, float gamma,
                       float gamma_lam, float rho_bar, float c_bar) {
        return VtraceArgs{at,
                          pointer<const float>(rewards),
                          pointer<const float>(values),
                          pointer<const float>(logprobs),
                          pointer<const float>(old_logprobs),
                          pointer<float>(targets),
                          pointer<float>(advantages),
                          gamma,
                          gamma_lam,
                          rho_bar,
                          c_bar};
      }));
  m.def("gae_cpu", &gae_cpu, release());
  m.def("discounted_returns_cpu", &returns_cpu, release());
  m.def("vtrace_cpu", &vtrace_cpu, release());
#ifdef FASTRL_HAS_CUDA
  m.def(
      "gae_cuda", [](const GaeArgs& a, Address s) { return cuda::gae(a, pointer<void>(s)); },
      release());
  m.def(
      "discounted_returns_cuda",
      [](const ReturnsArgs& a, Address s) { return cuda::returns(a, pointer<void>(s)); },
      release());
  m.def(
      "vtrace_cuda",
      [](const VtraceArgs& a, Address s) { return cuda::vtrace(a, pointer<void>(s)); }, release());
#endif
}

}  // namespace fastrl

// The only file that knows Python. Addresses, sizes and streams come in as integers; the Python
// side (kernels/<family>/op.py) has checked device, dtype, shape and contiguity before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/scan.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/error.h"
#include "cuda/scan.h"
#endif

namespace py = pybind11;
using fastrl::GaeArgs;
using fastrl::ReturnsArgs;
using fastrl::Segments;
using fastrl::VtraceArgs;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Segments segments(int64_t count, int64_t length, Address offsets, Address mask, Address bootstrap) {
  return {count, length, pointer<const int32_t>(offsets), pointer<const uint8_t>(mask),
          pointer<const float>(bootstrap)};
}

std::vector<std::string> names(const std::vector<fastrl::Isa>& isas) {
  std::vector<std::string> out;
  for (fastrl::Isa isa : isas) {
    out.push_back(fastrl::isa_name(isa));
  }
  return out;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTRL_COMPILER;
  info["isas"] = names(fastrl::compiled_isas());
#ifdef FASTRL_HAS_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = FASTRL_CUDA_ARCHS;
  return info;
}

void gae_cpu(const GaeArgs& args, int threads) {
  FASTRL_DISPATCH(gae, args, threads)
}
void returns_cpu(const ReturnsArgs& args, int threads) {
  FASTRL_DISPATCH(returns, args, threads)
}
void vtrace_cpu(const VtraceArgs& args, int threads) {
  FASTRL_DISPATCH(vtrace, args, threads)
}

}  // namespace

// Kernels run without the GIL. `where` is the number of threads on a CPU and the stream on a GPU.
PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("build_info", &build_info);
  m.def("isa", [] { return fastrl::isa_name(fastrl::isa()); });
  m.def("cpu_isas", [] { return names(fastrl::supported_isas()); });

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
  m.def("cuda_error", &fastrl::cuda::error_text);
  m.def(
      "gae_cuda",
      [](const GaeArgs& a, Address s) { return fastrl::cuda::gae(a, pointer<void>(s)); },
      release());
  m.def(
      "discounted_returns_cuda",
      [](const ReturnsArgs& a, Address s) { return fastrl::cuda::returns(a, pointer<void>(s)); },
      release());
  m.def(
      "vtrace_cuda",
      [](const VtraceArgs& a, Address s) { return fastrl::cuda::vtrace(a, pointer<void>(s)); },
      release());
#endif
}

// The module. It and the other bindings_*.cpp are the only files that know Python. Addresses, sizes
// and streams come in as integers; the Python side (kernels/<family>/op.py) has checked device,
// dtype, shape and contiguity before.
#include "bindings.h"

#include <pybind11/stl.h>

#include "cpu/float.h"
#include "cpu/isa.h"
#include "cpu/peak.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/error.h"
#endif

namespace py = pybind11;

namespace fastrl {
namespace {

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> out;
  for (Isa isa : isas) {
    out.push_back(isa_name(isa));
  }
  return out;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTRL_COMPILER;
  info["isas"] = names(compiled_isas());
#ifdef FASTRL_HAS_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = FASTRL_CUDA_ARCHS;
  return info;
}

Figures peak_cpu(int threads, double seconds) { FASTRL_DISPATCH(peak, threads, seconds) }

}  // namespace
}  // namespace fastrl

// Kernels run without the GIL. The last argument is a number of threads, or a stream on a GPU.
PYBIND11_MODULE(_C, m) {
  using namespace fastrl;
  m.def("build_info", &build_info);
  m.def("isa", [] { return isa_name(isa()); });
  m.def("cpu_isas", [] { return names(supported_isas()); });
  m.def("peak_cpu", &peak_cpu, py::call_guard<py::gil_scoped_release>());
#ifdef FASTRL_HAS_CUDA
  m.def("cuda_error", &cuda::error_text);
#endif
  py::enum_<Float>(m, "Float")
      .value("float32", Float::f32)
      .value("bfloat16", Float::bf16)
      .value("float16", Float::f16);
  bind_attention(m);
  bind_layers(m);
  bind_logprob(m);
  bind_decode(m);
  bind_quant(m);
  bind_scan(m);
}

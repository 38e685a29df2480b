// The ops of cpu/layers.h for Python; kernels/layers/cpu.py has checked what comes in.
#include "bindings.h"
#include "cpu/layers.h"

namespace py = pybind11;

namespace fastrl {
namespace {

void rmsnorm_cpu(const RmsnormArgs& args, int threads) { FASTRL_DISPATCH(rmsnorm, args, threads) }
void rmsnorm_bwd_cpu(const RmsnormBackwardArgs& args, int threads) {
  FASTRL_DISPATCH(rmsnorm_bwd, args, threads)
}
void rope_cpu(const RopeArgs& args, int threads) { FASTRL_DISPATCH(rope, args, threads) }
void rope_bwd_cpu(const RopeBackwardArgs& args, int threads) {
  FASTRL_DISPATCH(rope_bwd, args, threads)
}
void glu_cpu(const GluArgs& args, int threads) { FASTRL_DISPATCH(glu, args, threads) }
void glu_bwd_cpu(const GluBackwardArgs& args, int threads){FASTRL_DISPATCH(glu_bwd, args, threads)}

RopeArgs rope_args(int64_t tokens, int64_t heads, int64_t width, Float type, Address x,
                   Address cosine, Address sine, Address weight, float eps, Address out) {
  return {tokens,
          heads,
          width,
          type,
          pointer<const void>(x),
          pointer<const float>(cosine),
          pointer<const float>(sine),
          pointer<const float>(weight),
          eps,
          pointer<void>(out)};
}

GluArgs glu_args(int64_t count, Float type, Address gate, Address up, bool gelu, Address out) {
  return {
      count, type, pointer<const void>(gate), pointer<const void>(up), gelu, pointer<void>(out)};
}

}  // namespace

void bind_layers(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "rmsnorm_cpu",
      [](int64_t rows, int64_t width, Float type, Address x, Address residual, Address weight,
         float eps, Address sum, Address out, Address inverse, int threads) {
        rmsnorm_cpu({rows, width, type, pointer<const void>(x), pointer<const void>(residual),
                     pointer<const float>(weight), eps, pointer<void>(sum), pointer<void>(out),
                     pointer<float>(inverse)},
                    threads);
      },
      release());
  m.def(
      "rmsnorm_bwd_cpu",
      [](int64_t rows, int64_t width, Float type, Address sum, Address weight, Address inverse,
         Address grad_out, Address grad_sum, Address grad, Address grad_weight, int threads) {
        rmsnorm_bwd_cpu(
            {rows, width, type, pointer<const void>(sum), pointer<const float>(weight),
             pointer<const float>(inverse), pointer<const void>(grad_out),
             pointer<const void>(grad_sum), pointer<void>(grad), pointer<float>(grad_weight)},
            threads);
      },
      release());
  py::class_<RopeArgs>(m, "rope_args").def(py::init(&rope_args));
  m.def("rope_cpu", &rope_cpu, release());
  m.def(
      "rope_bwd_cpu",
      [](const RopeArgs& at, Address grad_out, Address grad, Address grad_weight, int threads) {
        rope_bwd_cpu(
            {at, pointer<const void>(grad_out), pointer<void>(grad), pointer<float>(grad_weight)},
            threads);
      },
      release());
  py::class_<GluArgs>(m, "glu_args").def(py::init(&glu_args));
  m.def("glu_cpu", &glu_cpu, release());
  m.def(
      "glu_bwd_cpu",
      [](const GluArgs& at, Address grad_out, Address grad_gate, Address grad_up, int threads) {
        glu_bwd_cpu(
            {at, pointer<const void>(grad_out), pointer<void>(grad_gate), pointer<void>(grad_up)},
            threads);
      },
      release());
}

}  // namespace fastrl

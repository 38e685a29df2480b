// The ops of cpu/quant.h and cuda/quant.h for Python; kernels/quant has checked what comes in.
#include "bindings.h"
#include "cpu/quant.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/quant.h"
#endif

namespace py = pybind11;

namespace fastrl {
namespace {

void quantize_rows_cpu(const QuantRowsArgs& args, int threads) {
  FASTRL_DISPATCH(quantize_rows, args, threads)
}
void rmsnorm_quant_cpu(const RmsnormQuantArgs& args, int threads) {
  FASTRL_DISPATCH(rmsnorm_quant, args, threads)
}
void glu_quant_cpu(const GluQuantArgs& args, int threads) {
  FASTRL_DISPATCH(glu_quant, args, threads)
}
void pool_score_cpu(const PoolScoreArgs& args, int threads) {
  FASTRL_DISPATCH(pool_score, args, threads)
}
void quantized_linear_cpu(const QuantLinearArgs& args, int threads) {
  FASTRL_DISPATCH(quantized_linear, args, threads)
}
void dequantized_linear_cpu(const QuantLinearArgs& args, int threads) {
  FASTRL_DISPATCH(dequantized_linear, args, threads)
}
void dequantize_cpu(const DequantizeArgs& args,
                    int threads){FASTRL_DISPATCH(dequantize, args, threads)}

QuantWeight quant_weight(QuantWeight::Scheme scheme, int64_t rows, int64_t columns, int64_t stride,
                         Address data, Address scale, int64_t block, Address absmax, Address code,
                         Address nested_absmax, Address nested_code, Address nested_offset) {
  return {scheme,
          rows,
          columns,
          stride,
          pointer<const uint8_t>(data),
          pointer<const float>(scale),
          block,
          pointer<const void>(absmax),
          pointer<const float>(code),
          pointer<const float>(nested_absmax),
          pointer<const float>(nested_code),
          pointer<const float>(nested_offset)};
}

QuantRowsArgs quant_rows_args(int64_t rows, int64_t width, Float type, Address x, Address data,
                              Address scale, Address sum) {
  return {rows,
          width,
          type,
          pointer<const void>(x),
          pointer<int8_t>(data),
          pointer<float>(scale),
          pointer<int32_t>(sum)};
}

RmsnormQuantArgs rmsnorm_quant_args(const QuantRowsArgs& at, Address residual, Address new_residual,
                                    Address weight, float reciprocal_width, float eps) {
  return {at,
          pointer<const void>(residual),
          pointer<void>(new_residual),
          pointer<const float>(weight),
          reciprocal_width,
          eps};
}

GluQuantArgs glu_quant_args(const QuantRowsArgs& at, Address up, bool gelu) {
  return {at, pointer<const void>(up), gelu};
}

PoolScoreArgs pool_score_args(int64_t rows, int64_t width, int64_t heads, Float type,
                              Address hidden, Address last, Address weight, Address head,
                              Address bias, float reciprocal_width, float eps, Address score) {
  return {rows,
          width,
          heads,
          type,
          pointer<const void>(hidden),
          pointer<const int64_t>(last),
          pointer<const float>(weight),
          pointer<const float>(head),
          pointer<const float>(bias),
          reciprocal_width,
          eps,
          pointer<float>(score)};
}

QuantLinearArgs quant_linear_args(int64_t rows, Address x, Float x_type, Address x_scale,
                                  const QuantWeight& weight, Address bias, Float out_type,
                                  Address out) {
  return {rows,   pointer<const void>(x),     x_type,   pointer<const float>(x_scale),
          weight, pointer<const float>(bias), out_type, pointer<void>(out)};
}

DequantizeArgs dequantize_args(const QuantWeight& weight, Float out_type, Address out) {
  return {weight, out_type, pointer<void>(out)};
}

}  // namespace

void bind_quant(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::enum_<QuantWeight::Scheme>(m, "QuantScheme")
      .value("int8", QuantWeight::Scheme::int8)
      .value("four_bit", QuantWeight::Scheme::four_bit)
      .value("fp8", QuantWeight::Scheme::fp8);
  py::class_<QuantWeight>(m, "quant_weight").def(py::init(&quant_weight));
  py::class_<QuantRowsArgs>(m, "quant_rows_args").def(py::init(&quant_rows_args));
  py::class_<RmsnormQuantArgs>(m, "rmsnorm_quant_args").def(py::init(&rmsnorm_quant_args));
  py::class_<GluQuantArgs>(m, "glu_quant_args").def(py::init(&glu_quant_args));
  py::class_<PoolScoreArgs>(m, "pool_score_args").def(py::init(&pool_score_args));
  py::class_<QuantLinearArgs>(m, "quant_linear_args").def(py::init(&quant_linear_args));
  py::class_<DequantizeArgs>(m, "dequantize_args").def(py::init(&dequantize_args));

  m.def("quantize_rows_cpu", &quantize_rows_cpu, release());
  m.def("rmsnorm_quant_cpu", &rmsnorm_quant_cpu, release());
  m.def("glu_quant_cpu", &glu_quant_cpu, release());
  m.def("pool_score_cpu", &pool_score_cpu, release());
  m.def("quantized_linear_cpu", &quantized_linear_cpu, release());
  m.def("dequantized_linear_cpu", &dequantized_linear_cpu, release());
  m.def("dequantize_cpu", &dequantize_cpu, release());
#ifdef FASTRL_HAS_CUDA
  m.def(
      "dequantize_cuda",
      [](const DequantizeArgs& a, Address s) { return cuda::dequantize(a, pointer<void>(s)); },
      release());
#endif
}

}  // namespace fastrl

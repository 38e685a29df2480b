// The ops of cpu/logprob.h, cpu/logits.h, cpu/sample.h and cuda/logprob.h for Python;
// kernels/logprob has checked what comes in.
#include "bindings.h"
#include "cpu/logits.h"
#include "cpu/logprob.h"
#include "cpu/sample.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/logprob.h"
#endif

namespace py = pybind11;

namespace fastrl {
namespace {

void linear_logprob_fwd_cpu(const LogprobForwardArgs& args, int threads) {
  FASTRL_DISPATCH(linear_logprob_fwd, args, threads)
}
void linear_logprob_bwd_cpu(const LogprobBackwardArgs& args, int threads) {
  FASTRL_DISPATCH(linear_logprob_bwd, args, threads)
}

void logits_logprob_fwd_cpu(const LogitsForwardArgs& args, int threads) {
  FASTRL_DISPATCH(logits_logprob_fwd, args, threads)
}
void logits_logprob_bwd_cpu(const LogitsBackwardArgs& args, int threads) {
  FASTRL_DISPATCH(logits_logprob_bwd, args, threads)
}
void linear_sample_cpu(const SampleArgs& args,
                       int threads){FASTRL_DISPATCH(linear_sample, args, threads)}

LinearArgs linear_args(int64_t rows, int64_t width, int64_t vocab, Address index, Address hidden,
                       Float hidden_type, Address weight, Float weight_type, int64_t weight_stride,
                       Address bias, Address inv_temperature, Address target, float logit_scale,
                       float softcap, Address scale, Address sum) {
  return {rows,
          width,
          vocab,
          pointer<const int64_t>(index),
          pointer<const void>(hidden),
          hidden_type,
          pointer<const void>(weight),
          weight_type,
          weight_stride,
          pointer<const float>(bias),
          pointer<const float>(inv_temperature),
          pointer<const int64_t>(target),
          logit_scale,
          softcap,
          {pointer<const float>(scale), pointer<const int32_t>(sum)}};
}

Workspace workspace(int64_t limit, Address kept, int64_t kept_bytes, bool in_gradient) {
  return {limit, pointer<void>(kept), kept_bytes, in_gradient};
}

LogprobForwardArgs forward_args(const LinearArgs& linear, const Workspace& workspace,
                                Address logprob, Address lse, Address entropy, Address means) {
  return {linear,
          workspace,
          pointer<float>(logprob),
          pointer<float>(lse),
          pointer<float>(entropy),
          pointer<float>(means)};
}

SampleArgs sample_args(const LinearArgs& linear, Address seeds, Address positions, bool greedy,
                       int64_t top_k, double top_p, double min_p, Address token, Address logprob,
                       Address untruncated) {
  return {linear,
          pointer<const int64_t>(seeds),
          pointer<const int64_t>(positions),
          greedy,
          top_k,
          top_p,
          min_p,
          pointer<int64_t>(token),
          pointer<float>(logprob),
          pointer<float>(untruncated)};
}

LogprobBackwardArgs backward_args(const LinearArgs& linear, const Workspace& workspace,
                                  Address logprob, Address lse, Address entropy, Address means,
                                  Address grad_logprob, Address grad_lse, Address grad_entropy,
                                  Address grad_hidden, Address grad_weight, Address grad_bias) {
  return {linear,
          workspace,
          pointer<const float>(logprob),
          pointer<const float>(lse),
          pointer<const float>(entropy),
          pointer<const float>(means),
          pointer<const float>(grad_logprob),
          pointer<const float>(grad_lse),
          pointer<const float>(grad_entropy),
          pointer<void>(grad_hidden),
          pointer<void>(grad_weight),
          pointer<float>(grad_bias)};
}

LogitsArgs logits_args(int64_t rows, int64_t vocab, int64_t targets, Address logits, Float type,
                       Address offset, Address inv_temperature, Address target) {
  return {rows,
          vocab,
          targets,
          pointer<const void>(logits),
          type,
          pointer<const int64_t>(offset),
          pointer<const float>(inv_temperature),
          pointer<const int64_t>(target)};
}

LogitsForwardArgs logits_forward_args(const LogitsArgs& logits, Address logprob, Address lse,
                                      Address entropy) {
  return {logits, pointer<float>(logprob), pointer<float>(lse), pointer<float>(entropy)};
}

LogitsBackwardArgs logits_backward_args(const LogitsArgs& logits, Address lse, Address entropy,
                                        Address grad_logprob, Address grad_lse,
                                        Address grad_entropy, Address grad) {
  return {logits,
          pointer<const float>(lse),
          pointer<const float>(entropy),
          pointer<const float>(grad_logprob),
          pointer<const float>(grad_lse),
          pointer<const float>(grad_entropy),
          pointer<void>(grad)};
}

#ifdef FASTRL_HAS_CUDA
TileArgs tile_args(int64_t rows, int64_t columns, int64_t first, Address product, int64_t stride,
                   Address bias, Address inv_temperature, Address target, float logit_scale,
                   float softcap) {
  return {rows,
          columns,
          first,
          pointer<const float>(product),
          stride,
          pointer<const float>(bias),
          pointer<const float>(inv_temperature),
          pointer<const int64_t>(target),
          logit_scale,
          softcap};
}

KeptArgs kept_args(Address exps, Float type, int64_t stride, Address highest,
                   int64_t highest_stride, float scale) {
  return {pointer<void>(exps), type, stride, pointer<float>(highest), highest_stride, scale};
}

LogprobFoldArgs fold_args(const TileArgs& logits, const KeptArgs& kept, Address highest,
                          Address total, Address weighted, Address at_target) {
  return {logits,
          kept,
          pointer<float>(highest),
          pointer<float>(total),
          pointer<float>(weighted),
          pointer<float>(at_target)};
}

LogprobGradientArgs gradient_args(const TileArgs& logits, const KeptArgs& kept, Address logprob,
                                  Address lse, Address entropy, Address of_p, Address of_spread,
                                  Address of_target, Address gradient, Float type, int64_t stride) {
  return {logits,
          kept,
          pointer<const float>(logprob),
          pointer<const float>(lse),
          pointer<const float>(entropy),
          pointer<const float>(of_p),
          pointer<const float>(of_spread),
          pointer<const float>(of_target),
          pointer<void>(gradient),
          type,
          stride};
}
#endif

}  // namespace

void bind_logprob(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<LinearArgs>(m, "linear_args").def(py::init(&linear_args));
  py::class_<Workspace>(m, "workspace").def(py::init(&workspace));
  py::class_<LogprobForwardArgs>(m, "linear_logprob_fwd_args").def(py::init(&forward_args));
  py::class_<LogprobBackwardArgs>(m, "linear_logprob_bwd_args").def(py::init(&backward_args));
  py::class_<SampleArgs>(m, "linear_sample_args").def(py::init(&sample_args));
  py::class_<LogitsArgs>(m, "logits_args").def(py::init(&logits_args));
  py::class_<LogitsForwardArgs>(m, "logits_logprob_fwd_args").def(py::init(&logits_forward_args));
  py::class_<LogitsBackwardArgs>(m, "logits_logprob_bwd_args").def(py::init(&logits_backward_args));
  m.def("linear_logprob_fwd_cpu", &linear_logprob_fwd_cpu, release());
  m.def("linear_logprob_bwd_cpu", &linear_logprob_bwd_cpu, release());
  m.def("logits_logprob_fwd_cpu", &logits_logprob_fwd_cpu, release());
  m.def("logits_logprob_bwd_cpu", &logits_logprob_bwd_cpu, release());
  m.def("linear_sample_cpu", &linear_sample_cpu, release());
#ifdef FASTRL_HAS_CUDA
  py::class_<TileArgs>(m, "tile_args").def(py::init(&tile_args));
  py::class_<KeptArgs>(m, "kept_args").def(py::init(&kept_args));
  py::class_<LogprobFoldArgs>(m, "linear_logprob_fold_args").def(py::init(&fold_args));
  py::class_<LogprobGradientArgs>(m, "linear_logprob_gradient_args").def(py::init(&gradient_args));
  m.def(
      "linear_logprob_fold_cuda",
      [](const LogprobFoldArgs& a, Address s) {
        return cuda::linear_logprob_fold(a, pointer<void>(s));
      },
      release());
  m.def(
      "linear_logprob_gradient_cuda",
      [](const LogprobGradientArgs& a, Address s) {
        return cuda::linear_logprob_gradient(a, pointer<void>(s));
      },
      release());
#endif
}

}  // namespace fastrl

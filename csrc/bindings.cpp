// The module. It and the other bindings*.cpp are the only files that know Python. Addresses, sizes
// and streams come in as integers; the Python side (kernels/<family>/op.py) has checked device,
// dtype, shape and contiguity before.
#include <pybind11/stl.h>
#include <sys/mman.h>

#include "bindings.h"
#include "cpu/attention.h"
#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/logprob.h"
#include "cpu/peak.h"
#include "cpu/quant.h"
#include "cpu/sample.h"
#include "cpu/scan.h"
#ifdef FASTRL_HAS_CUDA
#include "cuda/error.h"
#include "cuda/logprob.h"
#include "cuda/quant.h"
#include "cuda/scan.h"
#endif

namespace py = pybind11;
using fastrl::Address;
using fastrl::AttentionArgs;
using fastrl::AttentionBackwardArgs;
using fastrl::AttentionForwardArgs;
using fastrl::DecodeArgs;
using fastrl::DecodeLayer;
using fastrl::DecodeLinear;
using fastrl::DecodeMatrix;
using fastrl::DecodeModel;
using fastrl::DequantizeArgs;
using fastrl::Float;
using fastrl::GaeArgs;
using fastrl::GenerateArgs;
using fastrl::GluQuantArgs;
using fastrl::Heads;
using fastrl::LinearArgs;
using fastrl::LogitsArgs;
using fastrl::LogitsBackwardArgs;
using fastrl::LogitsForwardArgs;
using fastrl::LogprobBackwardArgs;
using fastrl::LogprobForwardArgs;
using fastrl::LowRank;
using fastrl::pointer;
using fastrl::PoolScoreArgs;
using fastrl::QuantLinearArgs;
using fastrl::QuantRowsArgs;
using fastrl::QuantWeight;
using fastrl::ReturnsArgs;
using fastrl::RmsnormQuantArgs;
using fastrl::SampleArgs;
using fastrl::Segments;
using fastrl::VtraceArgs;
using fastrl::Workspace;

namespace {

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

fastrl::Figures peak_cpu(int threads, double seconds) { FASTRL_DISPATCH(peak, threads, seconds) }

void gae_cpu(const GaeArgs& args, int threads) { FASTRL_DISPATCH(gae, args, threads) }
void returns_cpu(const ReturnsArgs& args, int threads) { FASTRL_DISPATCH(returns, args, threads) }
void vtrace_cpu(const VtraceArgs& args, int threads) { FASTRL_DISPATCH(vtrace, args, threads) }

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
void shared_prefix_attention_fwd_cpu(const AttentionForwardArgs& args, int threads) {
  FASTRL_DISPATCH(shared_prefix_attention_fwd, args, threads)
}
void shared_prefix_attention_bwd_cpu(const AttentionBackwardArgs& args, int threads){
    FASTRL_DISPATCH(shared_prefix_attention_bwd, args, threads)}

Heads heads(Address data, int64_t token_stride, int64_t head_stride) {
  return {pointer<const void>(data), token_stride, head_stride};
}

AttentionArgs attention_args(int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width,
                             Address offsets, Address group_offsets, int64_t groups, Float type,
                             const Heads& q, const Heads& k, const Heads& v, float scale,
                             float softcap, int64_t window) {
  return {tokens,
          heads,
          kv_heads,
          width,
          pointer<const int32_t>(offsets),
          pointer<const int32_t>(group_offsets),
          groups,
          type,
          q,
          k,
          v,
          scale,
          softcap,
          window};
}

AttentionForwardArgs attention_fwd_args(const AttentionArgs& at, Address out, Address rest,
                                        Address lse) {
  return {at, pointer<void>(out), pointer<int8_t>(rest), pointer<float>(lse)};
}

AttentionBackwardArgs attention_bwd_args(const AttentionArgs& at, const Heads& out, Address rest,
                                         Address lse, const Heads& grad_out, Address grad_lse,
                                         Address grad_q, Address grad_k, Address grad_v) {
  return {at,
          out,
          pointer<const int8_t>(rest),
          pointer<const float>(lse),
          grad_out,
          pointer<const float>(grad_lse),
          pointer<void>(grad_q),
          pointer<void>(grad_k),
          pointer<void>(grad_v)};
}

void linear_sample_cpu(const SampleArgs& args, int threads) {
  FASTRL_DISPATCH(linear_sample, args, threads)
}

// Asks for huge pages where memory covers them whole; a wish, which the system may not grant.
void use_huge_pages(Address memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr Address kPage = 2 << 20;
  const Address begin = (memory + kPage - 1) / kPage * kPage,
                end = (memory + bytes) / kPage * kPage;
  if (begin < end) {
    madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

// pybind11's stl.h would copy a bare vector.
struct DecodeScratch {
  fastrl::DecodeScratch arenas;
};

void decode_cpu(const DecodeModel& model, const DecodeArgs& args, DecodeScratch& scratch,
                int threads) {
  FASTRL_DISPATCH(decode, model, args, scratch.arenas, threads)
}

void generate_cpu(const DecodeModel& model, const GenerateArgs& args, DecodeScratch& scratch,
                  int threads){FASTRL_DISPATCH(generate, model, args, scratch.arenas, threads)}

DecodeMatrix decode_matrix(Address weight, int64_t rows, int64_t depth, int64_t stride,
                           Address bias, Float type) {
  return {pointer<const void>(weight), rows, depth, stride, pointer<const void>(bias), type};
}

LowRank low_rank(const DecodeMatrix& a, const DecodeMatrix& b, float scaling) {
  return {a, b, scaling};
}

DecodeLinear decode_linear(const DecodeMatrix& base, const std::vector<LowRank>& adapters) {
  return {base, adapters};
}

DecodeLayer decode_layer(const std::array<DecodeLinear, 7>& linear,
                         const std::array<Address, 6>& norm, int64_t window) {
  const auto at = [&](int i) { return pointer<const void>(norm[i]); };
  return {linear[0], linear[1], linear[2], linear[3], linear[4], linear[5], linear[6],
          at(0),     at(1),     at(2),     at(3),     at(4),     at(5),     window};
}

DecodeModel decode_model(int64_t width, int64_t heads, int64_t kv_heads, int64_t head_size,
                         Float type, Address embedding, int64_t embedding_stride,
                         float embedding_scale, Address final_norm, float eps, float norm_offset,
                         float attention_scale, float softcap, bool gelu,
                         const std::vector<DecodeLayer>& layers) {
  return {width,
          heads,
          kv_heads,
          head_size,
          type,
          pointer<const void>(embedding),
          embedding_stride,
          embedding_scale,
          pointer<const void>(final_norm),
          eps,
          norm_offset,
          attention_scale,
          softcap,
          gelu,
          layers};
}

DecodeArgs decode_args(int64_t rows, Address tokens, Address positions, Address base, Address start,
                       Address capacity, Address shared, Address chain_begin, Address chain,
                       Address cosine, Address sine, Address hidden) {
  return {rows,
          pointer<const int64_t>(tokens),
          pointer<const int64_t>(positions),
          pointer<const int64_t>(base),
          pointer<const int64_t>(start),
          pointer<const int64_t>(capacity),
          pointer<const int64_t>(shared),
          pointer<const int64_t>(chain_begin),
          pointer<const int64_t>(chain),
          pointer<const float>(cosine),
          pointer<const float>(sine),
          pointer<void>(hidden)};
}

GenerateArgs generate_args(const DecodeArgs& decode, const SampleArgs& sample, int64_t steps,
                           int64_t fewest, Address room, Address stops, int64_t stop_count,
                           Address count) {
  return {decode,
          sample,
          steps,
          fewest,
          pointer<const int64_t>(room),
          pointer<const int64_t>(stops),
          stop_count,
          pointer<int64_t>(count)};
}

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
                              Address scale) {
  return {rows, width, type, pointer<const void>(x), pointer<int8_t>(data), pointer<float>(scale)};
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

QuantLinearArgs quant_linear_args(int64_t rows, Address x, Address x_scale,
                                  const QuantWeight& weight, Address bias, Float out_type,
                                  Address out) {
  return {rows,
          pointer<const void>(x),
          pointer<const float>(x_scale),
          weight,
          pointer<const float>(bias),
          out_type,
          pointer<void>(out)};
}

DequantizeArgs dequantize_args(const QuantWeight& weight, Float out_type, Address out) {
  return {weight, out_type, pointer<void>(out)};
}

LinearArgs linear_args(int64_t rows, int64_t width, int64_t vocab, Address index, Address hidden,
                       Float hidden_type, Address weight, Float weight_type, int64_t weight_stride,
                       Address bias, Address inv_temperature, Address target, float logit_scale,
                       float softcap) {
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
          softcap};
}

Workspace workspace(int64_t limit, Address kept, int64_t kept_bytes) {
  return {limit, pointer<void>(kept), kept_bytes};
}

LogprobForwardArgs forward_args(const LinearArgs& linear, const Workspace& workspace,
                                Address logprob, Address lse, Address entropy) {
  return {linear, workspace, pointer<float>(logprob), pointer<float>(lse), pointer<float>(entropy)};
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
                                  Address logprob, Address lse, Address entropy,
                                  Address grad_logprob, Address grad_lse, Address grad_entropy,
                                  Address grad_hidden, Address grad_weight, Address grad_bias) {
  return {linear,
          workspace,
          pointer<const float>(logprob),
          pointer<const float>(lse),
          pointer<const float>(entropy),
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
fastrl::TileArgs tile_args(int64_t rows, int64_t columns, int64_t first, Address product,
                           int64_t stride, Address bias, Address inv_temperature, Address target,
                           float logit_scale, float softcap) {
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

fastrl::KeptArgs kept_args(Address exps, Float type, int64_t stride, Address highest,
                           int64_t highest_stride, float scale) {
  return {pointer<void>(exps), type, stride, pointer<float>(highest), highest_stride, scale};
}

fastrl::LogprobFoldArgs fold_args(const fastrl::TileArgs& logits, const fastrl::KeptArgs& kept,
                                  Address highest, Address total, Address weighted,
                                  Address at_target) {
  return {logits,
          kept,
          pointer<float>(highest),
          pointer<float>(total),
          pointer<float>(weighted),
          pointer<float>(at_target)};
}

fastrl::LogprobGradientArgs gradient_args(const fastrl::TileArgs& logits,
                                          const fastrl::KeptArgs& kept, Address logprob,
                                          Address lse, Address entropy, Address of_p,
                                          Address of_spread, Address of_target, Address gradient,
                                          Float type, int64_t stride) {
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

// Kernels run without the GIL. The last argument is a number of threads, or a stream on a GPU.
PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;

  m.def("build_info", &build_info);
  m.def("isa", [] { return fastrl::isa_name(fastrl::isa()); });
  m.def("cpu_isas", [] { return names(fastrl::supported_isas()); });
  m.def("peak_cpu", &peak_cpu, release());

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

  py::enum_<Float>(m, "Float")
      .value("float32", Float::f32)
      .value("bfloat16", Float::bf16)
      .value("float16", Float::f16);
  fastrl::bind_layers(m);
  py::class_<LinearArgs>(m, "linear_args").def(py::init(&linear_args));
  py::class_<Workspace>(m, "workspace").def(py::init(&workspace));
  py::class_<LogprobForwardArgs>(m, "linear_logprob_fwd_args").def(py::init(&forward_args));
  py::class_<LogprobBackwardArgs>(m, "linear_logprob_bwd_args").def(py::init(&backward_args));
  py::class_<SampleArgs>(m, "linear_sample_args").def(py::init(&sample_args));
  py::class_<LogitsArgs>(m, "logits_args").def(py::init(&logits_args));
  py::class_<LogitsForwardArgs>(m, "logits_logprob_fwd_args").def(py::init(&logits_forward_args));
  py::class_<LogitsBackwardArgs>(m, "logits_logprob_bwd_args").def(py::init(&logits_backward_args));

  py::class_<Heads>(m, "Heads").def(py::init(&heads));
  py::class_<AttentionArgs>(m, "attention_args").def(py::init(&attention_args));
  py::class_<AttentionForwardArgs>(m, "attention_fwd_args").def(py::init(&attention_fwd_args));
  py::class_<AttentionBackwardArgs>(m, "attention_bwd_args").def(py::init(&attention_bwd_args));

  m.def("shared_prefix_attention_fwd_cpu", &shared_prefix_attention_fwd_cpu, release());
  m.def("shared_prefix_attention_bwd_cpu", &shared_prefix_attention_bwd_cpu, release());
  py::class_<DecodeMatrix>(m, "decode_matrix").def(py::init(&decode_matrix));
  py::class_<LowRank>(m, "low_rank").def(py::init(&low_rank));
  py::class_<DecodeLinear>(m, "decode_linear").def(py::init(&decode_linear));
  py::class_<DecodeLayer>(m, "decode_layer").def(py::init(&decode_layer));
  py::class_<DecodeModel>(m, "decode_model").def(py::init(&decode_model));
  py::class_<DecodeArgs>(m, "decode_args").def(py::init(&decode_args));
  py::class_<GenerateArgs>(m, "generate_args").def(py::init(&generate_args));

  m.def("use_huge_pages", &use_huge_pages);
  py::class_<DecodeScratch>(m, "decode_scratch").def(py::init<>());

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
  m.def("decode_cpu", &decode_cpu, release());
  m.def("generate_cpu", &generate_cpu, release());
  m.def("linear_logprob_fwd_cpu", &linear_logprob_fwd_cpu, release());
  m.def("linear_logprob_bwd_cpu", &linear_logprob_bwd_cpu, release());
  m.def("logits_logprob_fwd_cpu", &logits_logprob_fwd_cpu, release());
  m.def("logits_logprob_bwd_cpu", &logits_logprob_bwd_cpu, release());
  m.def("linear_sample_cpu", &linear_sample_cpu, release());
  m.def("gae_cpu", &gae_cpu, release());
  m.def("discounted_returns_cpu", &returns_cpu, release());
  m.def("vtrace_cpu", &vtrace_cpu, release());
#ifdef FASTRL_HAS_CUDA
  py::class_<fastrl::TileArgs>(m, "tile_args").def(py::init(&tile_args));
  py::class_<fastrl::KeptArgs>(m, "kept_args").def(py::init(&kept_args));
  py::class_<fastrl::LogprobFoldArgs>(m, "linear_logprob_fold_args").def(py::init(&fold_args));
  py::class_<fastrl::LogprobGradientArgs>(m, "linear_logprob_gradient_args")
      .def(py::init(&gradient_args));
  m.def("cuda_error", &fastrl::cuda::error_text);
  m.def(
      "linear_logprob_fold_cuda",
      [](const fastrl::LogprobFoldArgs& a, Address s) {
        return fastrl::cuda::linear_logprob_fold(a, pointer<void>(s));
      },
      release());
  m.def(
      "linear_logprob_gradient_cuda",
      [](const fastrl::LogprobGradientArgs& a, Address s) {
        return fastrl::cuda::linear_logprob_gradient(a, pointer<void>(s));
      },
      release());
  m.def(
      "dequantize_cuda",
      [](const DequantizeArgs& a, Address s) {
        return fastrl::cuda::dequantize(a, pointer<void>(s));
      },
      release());
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

// The ops of cpu/attention.h for Python; kernels/attention/cpu.py has checked what comes in.
#include "bindings.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace fastrl {
namespace {

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

}  // namespace

void bind_attention(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Heads>(m, "Heads").def(py::init(&heads));
  py::class_<AttentionArgs>(m, "attention_args").def(py::init(&attention_args));
  py::class_<AttentionForwardArgs>(m, "attention_fwd_args").def(py::init(&attention_fwd_args));
  py::class_<AttentionBackwardArgs>(m, "attention_bwd_args").def(py::init(&attention_bwd_args));

  m.def("shared_prefix_attention_fwd_cpu", &shared_prefix_attention_fwd_cpu, release());
  m.def("shared_prefix_attention_bwd_cpu", &shared_prefix_attention_bwd_cpu, release());
}

}  // namespace fastrl

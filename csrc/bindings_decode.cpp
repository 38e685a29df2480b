// The ops of cpu/decode.h for Python; fastrl/rollout/decoder.py has checked what comes in.
#include <pybind11/stl.h>
#include <sys/mman.h>

#include "bindings.h"
#include "cpu/decode.h"

namespace py = pybind11;

namespace fastrl {
namespace {

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
struct Scratch {
  DecodeScratch arenas;
};

void decode_cpu(const DecodeModel& model, const DecodeArgs& args, Scratch& scratch, int threads) {
  FASTRL_DISPATCH(decode, model, args, scratch.arenas, threads)
}

void generate_cpu(const DecodeModel& model, const GenerateArgs& args, Scratch& scratch,
                  int threads){FASTRL_DISPATCH(generate, model, args, scratch.arenas, threads)}

DecodeMatrix decode_matrix(Address weight, int64_t rows, int64_t depth, int64_t stride,
                           Address bias, Float type, Address scale, Address sum) {
  return {pointer<const void>(weight),
          rows,
          depth,
          stride,
          pointer<const void>(bias),
          type,
          {pointer<const float>(scale), pointer<const int32_t>(sum)}};
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
                         float attention_scale, float softcap, bool gelu, bool int8,
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
          int8,
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

// A number that changes, as good as surely, when arrays are written to all over.
uint64_t glimpse(const std::vector<Address>& arrays, const std::vector<int64_t>& bytes) {
  constexpr int64_t kSpots = 16;  // of an array
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto* data = pointer<const char>(arrays[i]);
    const int64_t words = bytes[i] / 4;
    for (int64_t spot = 0; spot < std::min(kSpots, words); ++spot) {
      uint32_t word;
      std::memcpy(&word, data + spot * words / kSpots * 4, sizeof word);
      hash = (hash ^ word) * 1099511628211u;
    }
  }
  return hash;
}

}  // namespace

void bind_decode(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<DecodeMatrix>(m, "decode_matrix").def(py::init(&decode_matrix));
  py::class_<LowRank>(m, "low_rank").def(py::init(&low_rank));
  py::class_<DecodeLinear>(m, "decode_linear").def(py::init(&decode_linear));
  py::class_<DecodeLayer>(m, "decode_layer").def(py::init(&decode_layer));
  py::class_<DecodeModel>(m, "decode_model").def(py::init(&decode_model));
  py::class_<DecodeArgs>(m, "decode_args").def(py::init(&decode_args));
  py::class_<GenerateArgs>(m, "generate_args").def(py::init(&generate_args));

  m.def("use_huge_pages", &use_huge_pages);
  m.def("glimpse", &glimpse);
  py::class_<Scratch>(m, "decode_scratch").def(py::init<>());
  m.def("decode_cpu", &decode_cpu, release());
  m.def("generate_cpu", &generate_cpu, release());
}

}  // namespace fastrl

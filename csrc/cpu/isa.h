// Which instruction set the CPU kernels run on, chosen once per process.
//
// Each csrc/cpu/<op>.cpp is compiled once per instruction set, with FASTRL_ISA naming it and its
// namespace. A header declares the op in every namespace with FASTRL_FOR_EACH_ISA, and callers pick
// with FASTRL_DISPATCH:
//
//   #define DECLARE(isa) namespace isa { void gae(const GaeArgs&, int threads); }
//   FASTRL_FOR_EACH_ISA(DECLARE)
//   ...
//   FASTRL_DISPATCH(gae, args, threads);
#pragma once

#include <string>
#include <vector>

namespace fastrl {

enum class Isa { generic, avx2, avx512, avx512_vnni, avx512_bf16, amx };

// The set in use: the best that was compiled in and that this machine has, capped by FASTRL_ISA.
// Throws std::invalid_argument when FASTRL_ISA names an unknown one or one that cannot run here.
Isa isa();

std::string isa_name(Isa isa);
std::vector<Isa> compiled_isas();
std::vector<Isa> supported_isas();  // compiled in and able to run on this machine

}  // namespace fastrl

#define FASTRL_FOR_EACH_ISA(X) X(generic) X(avx2) X(avx512) X(avx512_vnni) X(avx512_bf16) X(amx)

#ifdef FASTRL_HAS_AVX2
#define FASTRL_CASE_AVX2(fn, ...) \
  case ::fastrl::Isa::avx2:       \
    return ::fastrl::avx2::fn(__VA_ARGS__);
#else
#define FASTRL_CASE_AVX2(fn, ...)
#endif
#ifdef FASTRL_HAS_AVX512
#define FASTRL_CASE_AVX512(fn, ...) \
  case ::fastrl::Isa::avx512:       \
    return ::fastrl::avx512::fn(__VA_ARGS__);
#else
#define FASTRL_CASE_AVX512(fn, ...)
#endif
#ifdef FASTRL_HAS_AVX512_VNNI
#define FASTRL_CASE_AVX512_VNNI(fn, ...) \
  case ::fastrl::Isa::avx512_vnni:       \
    return ::fastrl::avx512_vnni::fn(__VA_ARGS__);
#else
#define FASTRL_CASE_AVX512_VNNI(fn, ...)
#endif
#ifdef FASTRL_HAS_AVX512_BF16
#define FASTRL_CASE_AVX512_BF16(fn, ...) \
  case ::fastrl::Isa::avx512_bf16:       \
    return ::fastrl::avx512_bf16::fn(__VA_ARGS__);
#else
#define FASTRL_CASE_AVX512_BF16(fn, ...)
#endif
#ifdef FASTRL_HAS_AMX
#define FASTRL_CASE_AMX(fn, ...) \
  case ::fastrl::Isa::amx:       \
    return ::fastrl::amx::fn(__VA_ARGS__);
#else
#define FASTRL_CASE_AMX(fn, ...)
#endif

// Returns from the enclosing function with the op's result.
#define FASTRL_DISPATCH(fn, ...)                 \
  switch (::fastrl::isa()) {                     \
    FASTRL_CASE_AMX(fn, __VA_ARGS__)             \
    FASTRL_CASE_AVX512_BF16(fn, __VA_ARGS__)     \
    FASTRL_CASE_AVX512_VNNI(fn, __VA_ARGS__)     \
    FASTRL_CASE_AVX512(fn, __VA_ARGS__)          \
    FASTRL_CASE_AVX2(fn, __VA_ARGS__)            \
    default:                                     \
      return ::fastrl::generic::fn(__VA_ARGS__); \
  }

#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastrl {
namespace {

constexpr Isa kAll[] = {Isa::generic,     Isa::avx2,        Isa::avx512,
                        Isa::avx512_vnni, Isa::avx512_bf16, Isa::amx};

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
#ifdef FASTRL_HAS_AVX2
      return true;
#else
      return false;
#endif
    case Isa::avx512:
#ifdef FASTRL_HAS_AVX512
      return true;
#else
      return false;
#endif
    case Isa::avx512_vnni:
#ifdef FASTRL_HAS_AVX512_VNNI
      return true;
#else
      return false;
#endif
    case Isa::avx512_bf16:
#ifdef FASTRL_HAS_AVX512_BF16
      return true;
#else
      return false;
#endif
    case Isa::amx:
#ifdef FASTRL_HAS_AMX
      return true;
#else
      return false;
#endif
  }
  return false;
}

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// Linux keeps the tile registers from a process until it asks: the signal frame grows by 8 KB.
[[maybe_unused]] bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
#ifdef FASTRL_EMULATE_AMX
  return has_avx512_vnni();
#else
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    return false;
  }
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  return (d & kTiles) == kTiles && request_tiles();
#endif
}
#endif

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
      return has_avx2();
    case Isa::avx512:
      return has_avx512();
    case Isa::avx512_vnni:
      return has_avx512_vnni();
    case Isa::avx512_bf16:
      return has_avx512_bf16();
    case Isa::amx:
      return has_amx();
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) {
    text += (text.empty() ? "" : ", ") + isa_name(isa);
  }
  return text;
}

Isa choose() {
  const std::vector<Isa> usable = supported_isas();
  const char* asked = std::getenv("FASTRL_ISA");
  if (asked == nullptr || *asked == '\0') {
    return usable.back();
  }
  for (Isa isa : kAll) {
    if (isa_name(isa) != asked) {
      continue;
    }
    if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
      throw std::invalid_argument(
          std::string("FASTRL_ISA=") + asked + " cannot run: " +
          (compiled(isa) ? "this CPU does not have it" : "it was not compiled into this build") +
          "; usable here: " + names(usable));
    }
    return isa;
  }
  throw std::invalid_argument(std::string("FASTRL_ISA=") + asked +
                              " is unknown; use one of generic, avx2, avx512, avx512_vnni, "
                              "avx512_bf16, amx");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

std::string isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "";
}

std::vector<Isa> compiled_isas() {
  std::vector<Isa> isas;
  std::copy_if(std::begin(kAll), std::end(kAll), std::back_inserter(isas), compiled);
  return isas;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (Isa isa : compiled_isas()) {
    if (runs_here(isa)) {
      isas.push_back(isa);
    }
  }
  return isas;
}

}  // namespace fastrl

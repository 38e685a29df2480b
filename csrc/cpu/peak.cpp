// Arithmetic happens in registers alone, in more independent chains than an instruction has cycles
// of latency. Each figure is the best of several repeats: other processes can only lower it.
#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int kRepeats = 5;
constexpr long kSteps = 4096;  // of a loop between two looks at the clock

double now() {
  using std::chrono::steady_clock;
  return std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once and returns the seconds from the first start to the
// last end.
double together(int threads, const std::function<void(int)>& work) {
  std::atomic<int> waiting{threads};
  std::vector<double> start(threads), end(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      --waiting;
      while (waiting > 0) {
        std::this_thread::yield();
      }
      start[t] = now();
      work(t);
      end[t] = now();
    });
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
  return *std::max_element(end.begin(), end.end()) - *std::min_element(start.begin(), start.end());
}

// The best rate of `kernel`, which does `operations` in each of its kSteps steps.
double compute(int threads, double seconds, double operations,
               const std::function<void()>& kernel) {
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::vector<long> calls(threads);
    const double took = together(threads, [&](int t) {
      const double until = now() + seconds / kRepeats;
      do {
        kernel();
        ++calls[t];
      } while (now() < until);
    });
    double total = 0;
    for (long n : calls) {
      total += static_cast<double>(n) * kSteps * operations;
    }
    best = std::max(best, total / took);
  }
  return best * 1e-9;
}

// An operand of KEEP is in a register, and what the compiler knew of its value is forgotten.
#if defined(__AVX512F__)
#define KEEP(x) asm volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define KEEP(x) asm volatile("" : "+x"(x))
#else
#define KEEP(x) asm volatile("" : "+w"(x))
#endif

// Two instructions a cycle with up to six cycles of latency, and with the operands within the 16
// registers of AVX2. Twelve names, because an array of them would live in memory.
constexpr int kChains = 12;
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

template <class Sum, class Step>
void chains(Sum zero, Step step) {
#define START(c) Sum sum##c = zero;
#define STEP(c) \
  step(sum##c); \
  KEEP(sum##c);
  CHAINS(START)
  for (long i = 0; i < kSteps; ++i) {
    CHAINS(STEP)
  }
#undef START
#undef STEP
}

#if defined(__AVX512F__)
using Floats = __m512;
Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
using Floats = __m256;
Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Floats __attribute__((vector_size(16)));
Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
constexpr int kFloats = sizeof(Floats) / sizeof(float);

void float32() {
  Floats a = Floats{} + 0.5f, b = a;
  KEEP(a);
  KEEP(b);
  chains(Floats{}, [&](Floats& sum) {
    KEEP(a);  // or a * b would be computed once where the two are not one instruction
    sum = multiply_add(a, b, sum);
  });
}

#if defined(__AVX512BF16__)
void bf16_dot() {
  __m512i one = _mm512_set1_epi32(0x3f003f00);  // pairs of 0.5
  KEEP(one);
  chains(__m512{}, [&](__m512& sum) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(one), reinterpret_cast<__m512bh>(one));
  });
}
#endif

#if defined(__AVX512VNNI__)
void int8_dot() {
  __m512i three = _mm512_set1_epi8(3);
  KEEP(three);
  chains(__m512i{}, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, three, three); });
}
#endif

#if defined(__AMX_TILE__)
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void load_tiles(uint32_t word) {
  static const TileConfig config;
  alignas(64) uint32_t values[16][16];
  std::fill_n(&values[0][0], 256, word);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, values, 64);
  _tile_loadd(5, values, 64);
  _tile_loadd(6, values, 64);
  _tile_loadd(7, values, 64);
}

void bf16_tiles() {  // two by two tiles, as a matrix product uses them
  load_tiles(0x3f003f00);
  for (long i = 0; i < kSteps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

void int8_tiles() {
  load_tiles(0x03030303);
  for (long i = 0; i < kSteps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}
#endif

// Memory: far more than the last cache holds, each thread its own part.
constexpr size_t kHugePage = size_t{2} << 20, kBuffer = size_t{512} << 20;

struct Buffer {
  explicit Buffer(bool huge_pages) {
    data = static_cast<char*>(std::aligned_alloc(kHugePage, kBuffer));
    if (data == nullptr) {
      throw std::bad_alloc();
    }
#if defined(__linux__)
    madvise(data, kBuffer, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    std::memset(data, 1, kBuffer);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data;
};

typedef uint64_t Words __attribute__((vector_size(sizeof(Floats))));

void sum(const char* data, size_t bytes) {
  constexpr int kSums = 8;
  Words sums[kSums] = {};
  const auto* from = reinterpret_cast<const Words*>(data);
  for (size_t i = 0; i < bytes / sizeof(Words); i += kSums) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) {
      sums[j] += from[i + j];
    }
  }
  for (Words& s : sums) {
    KEEP(s);
  }
}

double memory(int threads, double seconds, double bytes,
              const std::function<void(size_t, size_t)>& pass) {
  const size_t part = kBuffer / threads / 4096 * 4096;
  double best = 0;
  const double until = now() + seconds;
  for (int repeat = 0; repeat < kRepeats || now() < until; ++repeat) {
    const double took = together(threads, [&](int t) { pass(t * part, part); });
    best = std::max(best, bytes * static_cast<double>(part) * threads / took);
  }
  return best * 1e-9;
}

}  // namespace

Figures peak(int threads, double seconds) {
  Figures found;
  const auto add = [&](const char* name, double operations, void (*kernel)()) {
    found.emplace_back(name, compute(threads, seconds, operations, kernel));
  };
  add("float32", 2.0 * kFloats * kChains, float32);
#if defined(__AVX512BF16__)
  add("bf16_dot", 64.0 * kChains, bf16_dot);
#endif
#if defined(__AVX512VNNI__)
  add("int8_dot", 128.0 * kChains, int8_dot);
#endif
#if defined(__AMX_TILE__)  // isa.cpp asked Linux for the tile registers
  add("bf16_tiles", 4 * 2.0 * 16 * 16 * 32, bf16_tiles);
  add("int8_tiles", 4 * 2.0 * 16 * 16 * 64, int8_tiles);
#endif
  for (bool huge : {false, true}) {
    const Buffer from(huge), to(huge);
    const std::string pages = huge ? "_huge_pages" : "_4k_pages";
    const auto read = [&](size_t at, size_t bytes) { sum(from.data + at, bytes); };
    const auto copy = [&](size_t at, size_t bytes) {
      std::memcpy(to.data + at, from.data + at, bytes);
    };
    found.emplace_back("read" + pages, memory(threads, seconds, 1, read));
    found.emplace_back("copy" + pages, memory(threads, seconds, 2, copy));
  }
  return found;
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

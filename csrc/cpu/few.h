// Products of gemm.h, bit for bit, with no more tokens than a vector has lanes: weights read from
// memory once. With tokens in lanes each weight would be loaded and broadcast for a single
// multiplication. Here rows of weights ride in lanes: a slice of them is turned in registers into
//
//   turned [depth][rows], in the nearest cache,
//
// and a token's number, broadcast, meets kWide vectors of them. 16-bit weights turn in pairs. With
// fewer tokens still, what is turned meets them before it leaves the registers.
#pragma once

#include "pack.h"
#include "stream.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

constexpr int kWide = kLanes == 16 ? 3 : 2;  // vectors of rows
constexpr int kAbreast = kWide * kLanes;
constexpr int64_t kSlice = 128;  // of depth
static_assert(kBlock % kAbreast == 0 && kWide <= kVectors && Floats::kSteps % kSlice == 0);

// Depth [0, steps) of kLanes rows, of which `last` is the last one that there is, as floats:
// to[k * kPanel + row]. Meanwhile `lines` cache lines from `ahead` on are asked for with each tile.
inline void turn_rows(const EvenRows& a, Float type, int last, int64_t steps, const char* ahead,
                      int lines, float* to) {
  const int64_t size = bytes(type), together = 4 * kLanes / size;
  const auto row = [&](int r) { return a.data + std::min(r, last) * a.stride; };
  int64_t k = 0;
  for (; type != Float::f16 && k + together <= steps; k += together) {
    for (int i = 0; i < lines; ++i, ahead += 64) {
      __builtin_prefetch(ahead, 0, 2);
    }
    Vec tile[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      std::memcpy(&tile[r], row(r) + k * size, sizeof(Vec));
    }
    transpose(tile);
    for (int i = 0; i < kLanes; ++i) {
      if (type == Float::f32) {
        store(to + (k + i) * kPanel, tile[i]);
      } else {  // neighbours in depth, the first one in the low half
        store(to + (k + 2 * i) * kPanel, as_float(as_int(tile[i]) << 16));
        store(to + (k + 2 * i + 1) * kPanel, as_float(as_int(tile[i]) & -65536));
      }
    }
  }
  for (int r = 0; k < steps && r < kLanes; ++r) {
    float rest[kSlice];
    to_floats(row(r) + k * size, type, steps - k, rest);
    for (int64_t i = 0; i < steps - k; ++i) {
      to[(k + i) * kPanel + r] = rest[i];
    }
  }
}

// sums[token][row] of R of a panel's columns and kAbreast rows, from zero or going on; with each
// step of depth what is `pace` bytes further on is asked for.
template <int R>
__attribute__((noinline)) void multiply_turned(const float* turned, const float* panel, int columns,
                                               int64_t steps, const char* ahead, int64_t pace,
                                               float* sums, bool from_zero) {
  Vec sum[R][kWide];
#pragma GCC unroll 8
  for (int t = 0; t < R; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      sum[t][j] = from_zero ? splat(0.0f) : load(sums + t * kPanel + j * kLanes);
    }
  }
  for (int64_t k = 0; k < steps; ++k, turned += kPanel, panel += columns, ahead += pace) {
    __builtin_prefetch(ahead, 0, 2);
    Vec x[kWide];
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      x[j] = load(turned + j * kLanes);
    }
#pragma GCC unroll 8
    for (int t = 0; t < R; ++t) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        sum[t][j] = fma(x[j], splat(panel[t]), sum[t][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < R; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      store(sums + t * kPanel + j * kLanes, sum[t][j]);
    }
  }
}

// kLanes rows' sums of T tokens, c[row][token].
template <int T>
inline void store_turned(const Vec (&sum)[T], float* c) {
  Vec tile[kLanes] = {};
  for (int t = 0; t < T; ++t) {
    tile[t] = sum[t];
  }
  transpose(tile);
  for (int i = 0; i < kLanes; ++i) {
    store(c + i * kPanel, tile[i]);
  }
}

// C[rows x kPanel] = A * panel for at most kBlock rows of `type` and a panel [depth][T]: the sums
// of so few tokens stay in registers beside what is turned. Each row is read in order and asked for
// a few lines ahead, which the CPU's own prefetching then follows.
template <int T, Float type>
__attribute__((noinline)) void multiply_fewest(const EvenRows& a, int rows, int64_t steps,
                                               const float* panel, float* c) {
  constexpr int64_t size = bytes(type), kAhead = 256;
  constexpr int64_t kTogether = type == Float::bf16 ? 2 * kLanes : kLanes;
  for (int r0 = 0; r0 < rows; r0 += kLanes) {
    const char* row[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      row[r] = a.data + std::min(r0 + r, rows - 1) * a.stride;
    }
    Vec sum[T] = {}, all[T] = {};
    const float* x = panel;
    const auto add = [&](Vec w) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        sum[t] = fma(w, splat(x[t]), sum[t]);
      }
      x += T;
    };
    const auto finish = [&](int64_t k) {
      for (int t = 0; t < T; ++t) {
        all[t] = k <= Floats::kSteps ? sum[t] : all[t] + sum[t];
        sum[t] = splat(0.0f);
      }
    };
    int64_t k = 0;
    for (; k + kTogether <= steps; k += kTogether) {
      if (k > 0 && k % Floats::kSteps == 0) {
        finish(k);
      }
      int64_t ahead = k * size + kAhead;
      ahead += ahead < steps * size ? 0 : kLanes * a.stride - steps * size;
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        __builtin_prefetch(row[r] + ahead);
        if (type == Float::bf16) {  // neighbours in depth, the first one in the low half
          std::memcpy(&tile[r], row[r] + k * size, sizeof(Vec));
        } else {
          tile[r] = load_as<type>(row[r] + k * size);
        }
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (type == Float::bf16) {
          add(as_float(as_int(tile[i]) << 16));
          add(as_float(as_int(tile[i]) & -65536));
        } else {
          add(tile[i]);
        }
      }
    }
    if (k > 0 && k < steps && k % Floats::kSteps == 0) {
      finish(k);
    }
    alignas(64) float rest[kTogether][kLanes];
    for (int r = 0; k < steps && r < kLanes; ++r) {
      float of_row[kTogether] = {};
      to_floats(row[r] + k * size, type, steps - k, of_row);
      for (int64_t i = 0; i < steps - k; ++i) {
        rest[i][r] = of_row[i];
      }
    }
    for (int64_t i = 0; i < steps - k; ++i) {
      add(load(rest[i]));
    }
    finish(steps);
    store_turned<T>(all, c + r0 * kPanel);
  }
}

template <int T>
void multiply_fewest(const EvenRows& a, Float type, int rows, int64_t steps, const float* panel,
                     float* c) {
  const auto run = type == Float::f32    ? multiply_fewest<T, Float::f32>
                   : type == Float::bf16 ? multiply_fewest<T, Float::bf16>
                                         : multiply_fewest<T, Float::f16>;
  run(a, rows, steps, panel, c);
}

// Columns of a panel of `tokens` as multiply_few reads it: those that there is a product for.
inline int columns_of_few(int64_t tokens) {
  int columns = 1;
  while (columns < tokens) {
    columns *= 2;
  }
  return columns;
}

// C[rows x kPanel] = A * panel for at most kBlock rows of `type` and a panel [depth][columns].
inline void multiply_few(const EvenRows& a, Float type, int rows, int64_t steps, const float* panel,
                         int tokens, float* c) {
  constexpr int kMost = kLanes == 16 ? 8 : 4;  // tokens whose sums fit in registers
  const int columns = columns_of_few(tokens);
  if (columns <= (type == Float::bf16 ? 4 : kMost)) {  // half the bytes to wait for
    const auto run = columns == 1   ? multiply_fewest<1>
                     : columns == 2 ? multiply_fewest<2>
                     : columns == 4 ? multiply_fewest<4>
                                    : multiply_fewest<kMost>;
    return run(a, type, rows, steps, panel, c);
  }
  alignas(64) float turned[kSlice * kPanel], sums[kLanes * kPanel] = {}, all_sums[kLanes * kPanel];
  const int64_t size = bytes(type);
  for (int r0 = 0; r0 < rows; r0 += kAbreast) {
    const char* ahead = a.data + (r0 + kAbreast) * a.stride;
    for (int64_t k = 0; k < steps; k += kSlice) {
      // The rows that come next: the products ask for as much as they have time for.
      const int64_t count = std::min(kSlice, steps - k), all = kAbreast * count * size;
      const int64_t times = tokens / kMost * count;
      const int64_t pace = times ? std::min<int64_t>(all / times, 64) : 0;
      const int64_t left = all - pace * times;
      for (int r = 0; r < kAbreast; r += kLanes) {
        const int first = std::min(r0 + r, rows - 1);
        turn_rows({a.data + first * a.stride + k * size, a.stride}, type, rows - 1 - first, count,
                  ahead + r * left / kAbreast, static_cast<int>((kLanes * left + all - 1) / all),
                  turned + r);
      }
      ahead += left;
      int t = 0;
      const auto tile = [&](auto run, int wide, int64_t pace) {
        run(turned, panel + k * columns + t, columns, count, ahead, pace, sums + t * kPanel,
            k % Floats::kSteps == 0);
        t += wide;
        ahead += pace * count;
      };
      while (t + kMost <= tokens) {
        tile(multiply_turned<kMost>, kMost, pace);
      }
      if (t + 4 <= tokens) {
        tile(multiply_turned<4>, 4, 0);
      }
      if (t + 2 <= tokens) {
        tile(multiply_turned<2>, 2, 0);
      }
      if (t < tokens) {
        tile(multiply_turned<1>, 1, 0);
      }
      const bool whole = k + kSlice >= steps || (k + kSlice) % Floats::kSteps == 0;
      for (int64_t i = 0; whole && i < tokens * kPanel; i += kLanes) {
        const Vec sum = load(sums + i);
        store(all_sums + i, k < Floats::kSteps ? sum : load(all_sums + i) + sum);
      }
    }
    for (int r = 0; r < kAbreast; r += kLanes) {
      Vec tile[kLanes] = {};
      for (int t = 0; t < tokens; ++t) {
        tile[t] = load(all_sums + t * kPanel + r);
      }
      store_turned<kLanes>(tile, c + (r0 + r) * kPanel);
    }
  }
}

}  // namespace
}  // namespace FASTRL_ISA
}  // namespace fastrl

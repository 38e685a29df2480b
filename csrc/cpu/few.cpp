// See few.h.
#include "few.h"

#include "pack.h"

namespace fastrl {
namespace FASTRL_ISA {
namespace {

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

// C[rows x kPanel] = A * panel for at most kBlock rows of `type` and T columns of a panel: the sums
// of so few tokens stay in registers beside what is turned. Each row is read in order and asked for
// a few lines ahead, which the CPU's own prefetching then follows.
template <int T, Float type>
__attribute__((noinline)) void multiply_fewest(const EvenRows& a, int rows, int64_t steps,
                                               const float* panel, int64_t columns, float* c) {
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
      x += columns;
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
                     int64_t columns, float* c) {
  const auto run = type == Float::f32    ? multiply_fewest<T, Float::f32>
                   : type == Float::bf16 ? multiply_fewest<T, Float::bf16>
                                         : multiply_fewest<T, Float::f16>;
  run(a, rows, steps, panel, columns, c);
}

}  // namespace

void multiply_few(const EvenRows& a, Float type, int rows, int64_t steps,
                  const PanelView<float>& panel, float* c) {
  const int columns = columns_of_few(panel.tokens, type);
  if (columns == kLanes) {
    return multiply_streamed<Floats>(a, type, rows, steps, panel, c);
  }
  const auto run = columns == 1   ? multiply_fewest<1>
                   : columns == 2 ? multiply_fewest<2>
                   : columns == 4 ? multiply_fewest<4>
                                  : multiply_fewest<kFewest>;
  run(a, type, rows, steps, panel.data, panel.columns, c);
}

}  // namespace FASTRL_ISA
}  // namespace fastrl

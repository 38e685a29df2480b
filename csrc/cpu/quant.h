// Quantized weights and rows: the int8 ops (quant.cpp), and those that go through floats
// (dequant.cpp). What each computes, to the bit: kernels/quant/reference.py.
#pragma once

#include <cstdint>

#include "float.h"
#include "isa.h"

namespace fastrl {

// As kernels/quant/weight.py stores it.
struct QuantWeight {
  enum class Scheme { int8, four_bit, fp8 };
  Scheme scheme;
  int64_t rows, columns;
  int64_t stride;  // elements from one stored row to the next; two are a byte in four_bit
  const uint8_t* data;
  const float* scale;          // [rows]
  int64_t block;               // four_bit: elements that share an absmax, counted through all rows
  const void* absmax;          // float, or uint8_t when nested
  const float* code;           // [16]
  const float* nested_absmax;  // null unless nested: one for each 256 absmaxes
  const float* nested_code;    // [256]
  const float* nested_offset;  // one
};

// Rows [rows, width] of a floating type, one after the other, become int8 rows with scales.
struct QuantRowsArgs {
  int64_t rows, width;
  Float type;
  const void* x;
  int8_t* data;
  float* scale;
  int32_t* sum;  // [rows] of their integers, or null
};

struct RmsnormQuantArgs {
  QuantRowsArgs at;
  const void* residual;  // of the same type, or null
  void* new_residual;    // x + residual; null without one
  const float* weight;   // [width], with the offset added
  float reciprocal_width, eps;
};

struct GluQuantArgs {
  QuantRowsArgs at;  // x is the gate
  const void* up;
  bool gelu;
};

struct PoolScoreArgs {
  int64_t rows, width, heads;
  Float type;
  const void* hidden;
  const int64_t* last;  // [rows], rows of hidden
  const float* weight;  // of the norm, with the offset added
  const float* head;    // [heads, width]
  const float* bias;    // [heads] or null
  float reciprocal_width, eps;
  float* score;  // [rows, heads]
};

// out[m, n] = (sum_k x[m, k] w[n, k] * x_scale[m]) * w.scale[n] + bias[n].
struct QuantLinearArgs {
  int64_t rows;
  const void* x;         // with scales int8, or e4m3 for products in floats; else floats
  Float x_type;          // of floats; bf16 for products in floats
  const float* x_scale;  // [rows] or null
  QuantWeight weight;
  const float* bias;  // [n] or null
  Float out_type;
  void* out;  // [rows, n]
};

struct DequantizeArgs {
  QuantWeight weight;
  Float out_type;
  void* out;  // [rows, columns]
};

#define FASTRL_DECLARE_QUANT(isa)                                    \
  namespace isa {                                                    \
  void quantize_rows(const QuantRowsArgs& args, int threads);        \
  void rmsnorm_quant(const RmsnormQuantArgs& args, int threads);     \
  void glu_quant(const GluQuantArgs& args, int threads);             \
  void pool_score(const PoolScoreArgs& args, int threads);           \
  void quantized_linear(const QuantLinearArgs& args, int threads);   \
  void dequantized_linear(const QuantLinearArgs& args, int threads); \
  void dequantize(const DequantizeArgs& args, int threads);          \
  }
FASTRL_FOR_EACH_ISA(FASTRL_DECLARE_QUANT)

}  // namespace fastrl

// What one row (one token, `size` values) goes through, and the table of these functions for one instruction set. Arithmetic is float32.
#pragma once
#include <cstdint>

struct Row {
  const void *x, *y, *xr, *vr;  // absent: null; in the state's dtype
  const float *bias, *gate, *shift, *scale;
  float step, eps;
  void *out_x, *out_vr, *out;
  int64_t size;
  int64_t y_step, out_step;  // values from 32 of y and out to the next: 32, and more in tiles
};

struct RowFunctions {
  int width;  // floats in a vector
  // Each for float32 and bfloat16.
  void (*gated[2])(const Row&);
  void (*bias_gelu[2])(void* x, const float* bias, int64_t size);
};

constexpr int64_t MAX_SIZE = 8192;  // of a row: the float32 copy of one lives on the stack

const RowFunctions* baseline_functions();
const RowFunctions* avx2_functions();    // null where the compiler cannot make them
const RowFunctions* avx512_functions();
const RowFunctions* avx512_bf16_functions();

// For processors with AVX-512 that round to bfloat16 too. The instruction set holds for this file alone: one set of compiler flags builds all.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include <immintrin.h>
#define VECTOR_WIDTH 16
#define ROUNDS_BFLOAT16
#define FUNCTIONS avx512_bf16_functions
#include "row_functions.h"
#else
const RowFunctions* avx512_bf16_functions() { return nullptr; }
#endif

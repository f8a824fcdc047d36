// For processors with AVX-512. The instruction set holds for this file alone: one set of compiler flags builds all of them.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include <immintrin.h>
#define VECTOR_WIDTH 16
#define FUNCTIONS avx512_functions
#include "row_functions.h"
#else
const RowFunctions* avx512_functions() { return nullptr; }
#endif

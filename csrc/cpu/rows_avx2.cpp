// For processors with AVX2. The instruction set holds for this file alone: one set of compiler flags builds all of them.
#include "rows.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define VECTOR_WIDTH 8
#define FUNCTIONS avx2_functions
#include "row_functions.h"
#else
const RowFunctions* avx2_functions() { return nullptr; }
#endif

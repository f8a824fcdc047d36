// For every processor: four floats are SSE2 on x86-64 and NEON on ARM, which all of them have.
#include "rows.h"

#define VECTOR_WIDTH 4
#define FUNCTIONS baseline_functions
#include "row_functions.h"

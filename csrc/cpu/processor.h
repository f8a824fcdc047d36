// Which instructions may be used: the highest level that the processor has, up to what ODELT_FAST_CPU_LEVEL (baseline, avx2, avx512, amx) and
// PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) allow. The environment is read once. Each level has all of those before it.
#pragma once

enum Level { BASELINE, AVX2, AVX512, AMX };  // AMX: the tiles and their bfloat16 product, allowed by the system to this process

Level cpu_level();
bool rounds_bfloat16();  // whether AVX-512 has the instruction

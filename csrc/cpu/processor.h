// Which instructions may be used: those that the processor has, up to what PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) allows.
#pragma once

bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx();  // the tiles and their bfloat16 product, allowed by the system to this process

#include "processor.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

bool allowed(const char* least, const char* most) {
  const char* given = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string name = given ? given : most;
  return name == least || name == most;
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed("avx2", "avx512"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && allowed("avx512", "avx512");
}

bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d, a1 = 0;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b, &c, &b)) return false;
  constexpr unsigned TILES = 1u << 24, TILE_BFLOAT16 = 1u << 22, VECTOR_BFLOAT16 = 1u << 5;
  if (!(d & TILES) || !(d & TILE_BFLOAT16) || !(a1 & VECTOR_BFLOAT16)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_amx() { return false; }
#endif

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

bool has_avx512_bf16() {
  unsigned a = 0, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
}

bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  constexpr unsigned TILES = 1u << 24, TILE_BFLOAT16 = 1u << 22;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & TILE_BFLOAT16)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

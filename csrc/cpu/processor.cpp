#include "processor.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <string>

namespace {

std::string variable(const char* name, const char* otherwise) {
  const char* given = std::getenv(name);
  return given && *given ? given : otherwise;
}

Level allowed() {
  const std::string torch = variable("ATEN_CPU_CAPABILITY", "avx512"), ours = variable("ODELT_FAST_CPU_LEVEL", "amx");
  const Level by_torch = torch == "avx512" ? AMX : torch == "avx2" ? AVX2 : BASELINE;
  return std::min(by_torch, ours == "amx" ? AMX : ours == "avx512" ? AVX512 : ours == "avx2" ? AVX2 : BASELINE);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a, b, c, d;
  constexpr unsigned TILES = 1u << 24, TILE_BFLOAT16 = 1u << 22;
  if (!rounds_bfloat16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILES) || !(d & TILE_BFLOAT16)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

Level highest() {
  const Level most = allowed();
  if (most < AVX2 || !has_avx2()) return BASELINE;
  if (most < AVX512 || !has_avx512()) return AVX2;
  return most < AMX || !has_amx() ? AVX512 : AMX;
}

}  // namespace

Level cpu_level() {
  static const Level level = highest();
  return level;
}

bool rounds_bfloat16() {
  unsigned a = 0, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
}

#else
Level cpu_level() { return BASELINE; }
bool rounds_bfloat16() { return false; }
#endif

#include "csrc/cpu/isa_level.h"

#include <cstdlib>
#include <cstring>

namespace fastgpt {
namespace {

constexpr IsaLevel kLevels[] = {IsaLevel::baseline, IsaLevel::v3, IsaLevel::v4, IsaLevel::v4_bf16};

IsaLevel machine_level() {
#if defined(FASTGPT_X86_LEVELS)
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (!v3) return IsaLevel::baseline;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (!v4) return IsaLevel::v3;
  return __builtin_cpu_supports("avx512bf16") ? IsaLevel::v4_bf16 : IsaLevel::v4;
#else
  return IsaLevel::baseline;
#endif
}

// VDPBF16PS doubles the rate of a product on AMD's cores, but is slower than float32 FMA on Intel's
// (104 against 180 GFLOP/s a core, measured), so there it has to be asked for.
IsaLevel fastest_level(IsaLevel machine) {
#if defined(FASTGPT_X86_LEVELS)
  if (machine == IsaLevel::v4_bf16 && !__builtin_cpu_is("amd")) return IsaLevel::v4;
#endif
  return machine;
}

IsaLevel chosen_level() {
  const IsaLevel machine = machine_level();
  const char* asked = std::getenv("FASTGPT_CPU_ISA");
  if (asked == nullptr) return fastest_level(machine);
  for (const IsaLevel level : kLevels) {
    if (std::strcmp(asked, isa_name(level)) == 0) return level < machine ? level : machine;
  }
  return fastest_level(machine);
}

}  // namespace

const char* isa_name(IsaLevel level) {
  switch (level) {
    case IsaLevel::v3:
      return "v3";
    case IsaLevel::v4:
      return "v4";
    case IsaLevel::v4_bf16:
      return "v4_bf16";
    default:
      return "baseline";
  }
}

IsaLevel isa_level() {
  static const IsaLevel level = chosen_level();
  return level;
}

}  // namespace fastgpt

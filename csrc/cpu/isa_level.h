// The instruction set levels that the CPU kernels are compiled for.
#pragma once

namespace fastgpt {

enum class IsaLevel { baseline, v3, v4, v4_bf16 };

// The level in use: the highest that was compiled and that this machine has, lowered by the
// environment variable FASTGPT_CPU_ISA. Decided once.
IsaLevel isa_level();

// As FASTGPT_CPU_ISA spells them: "baseline", "v3", "v4", "v4_bf16".
const char* isa_name(IsaLevel level);

}  // namespace fastgpt

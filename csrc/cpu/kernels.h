// The CPU kernels of one ISA level: one pointer per entry point of csrc/ops.
#pragma once

#include "csrc/ops/layer_norm.h"

namespace fastgpt {

struct CpuKernels {
  void (*layer_norm_fwd)(const LayerNormFwd&);
  void (*layer_norm_bwd)(const LayerNormBwd&);
};

#if defined(FASTGPT_ISA)
// Defined by the op's file in csrc/cpu, once per level.
inline namespace FASTGPT_ISA {
void layer_norm_fwd_kernel(const LayerNormFwd& p);
void layer_norm_bwd_kernel(const LayerNormBwd& p);
}  // namespace FASTGPT_ISA
#endif

namespace baseline {
extern const CpuKernels kernels;
}
namespace v3 {
extern const CpuKernels kernels;
}
namespace v4 {
extern const CpuKernels kernels;
}
namespace v4_bf16 {
extern const CpuKernels kernels;
}

}  // namespace fastgpt

// The CPU entry points of csrc/ops: each runs the kernel of the ISA level in use.
#include "csrc/cpu/isa_level.h"
#include "csrc/cpu/kernels.h"

namespace fastgpt {
namespace {

const CpuKernels& active() {
  switch (isa_level()) {
#if defined(FASTGPT_X86_LEVELS)
    case IsaLevel::v4_bf16:
      return v4_bf16::kernels;
    case IsaLevel::v4:
      return v4::kernels;
    case IsaLevel::v3:
      return v3::kernels;
#endif
    default:
      return baseline::kernels;
  }
}

}  // namespace

namespace cpu {

void layer_norm_fwd(const LayerNormFwd& p) { active().layer_norm_fwd(p); }
void layer_norm_bwd(const LayerNormBwd& p) { active().layer_norm_bwd(p); }

}  // namespace cpu
}  // namespace fastgpt

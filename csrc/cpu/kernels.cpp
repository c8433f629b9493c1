// Compiled once per ISA level: the level's table.
#include "csrc/cpu/kernels.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

const CpuKernels kernels = {
    layer_norm_fwd_kernel,
    layer_norm_bwd_kernel,
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

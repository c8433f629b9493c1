// Compiled once per ISA level: the level's table.
#include "csrc/cpu/kernels.h"

#include "csrc/cpu/tile_gemm.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

const CpuKernels kernels = {
    attention_fwd_kernel,        attention_bwd_kernel,
    varlen_attention_fwd_kernel, varlen_attention_bwd_kernel,
    decode_attention_kernel,     layer_norm_fwd_kernel,
    layer_norm_bwd_kernel,       softmax_fwd_kernel,
    softmax_bwd_kernel,          masked_softmax_fwd_kernel,
    masked_softmax_bwd_kernel,   bias_gelu_fwd_kernel,
    bias_gelu_bwd_kernel,        cross_entropy_absorb_kernel,
    cross_entropy_finish_kernel, cross_entropy_bwd_kernel,
    matrix_product_kernel,       add_column_sums_kernel,
    add_scaled_kernel,           kHasPairs,
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

// The CPU kernels of one ISA level: one pointer per entry point of csrc/ops.
#pragma once

#include "csrc/ops/attention.h"
#include "csrc/ops/bias_gelu.h"
#include "csrc/ops/cross_entropy.h"
#include "csrc/ops/layer_norm.h"
#include "csrc/ops/linear_cross_entropy.h"
#include "csrc/ops/masked_softmax.h"
#include "csrc/ops/softmax.h"

namespace fastgpt {

struct CpuKernels {
  void (*attention_fwd)(const AttentionFwd&);
  void (*attention_bwd)(const AttentionBwd&);
  ContentError (*varlen_attention_fwd)(const VarlenAttentionFwd&);
  ContentError (*varlen_attention_bwd)(const VarlenAttentionBwd&);
  ContentError (*decode_attention)(const DecodeAttention&);
  void (*layer_norm_fwd)(const LayerNormFwd&);
  void (*layer_norm_bwd)(const LayerNormBwd&);
  void (*softmax_fwd)(const SoftmaxFwd&);
  void (*softmax_bwd)(const SoftmaxBwd&);
  void (*masked_softmax_fwd)(const MaskedSoftmaxFwd&);
  void (*masked_softmax_bwd)(const MaskedSoftmaxBwd&);
  void (*bias_gelu_fwd)(const BiasGeluFwd&);
  void (*bias_gelu_bwd)(const BiasGeluBwd&);
  void (*cross_entropy_absorb)(const CrossEntropyAbsorb&);
  void (*cross_entropy_finish)(const CrossEntropyFinish&);
  void (*cross_entropy_bwd)(const CrossEntropyBwd&);
  void (*matrix_product)(const MatrixProduct&);
  void (*add_column_sums)(const AddColumnSums&);
  void (*add_scaled)(const AddScaled&);
  bool multiplies_bf16;
};

#if defined(FASTGPT_ISA)
// Defined by the op's file in csrc/cpu, once per level.
inline namespace FASTGPT_ISA {
void attention_fwd_kernel(const AttentionFwd& p);
void attention_bwd_kernel(const AttentionBwd& p);
ContentError varlen_attention_fwd_kernel(const VarlenAttentionFwd& p);
ContentError varlen_attention_bwd_kernel(const VarlenAttentionBwd& p);
ContentError decode_attention_kernel(const DecodeAttention& p);
void layer_norm_fwd_kernel(const LayerNormFwd& p);
void layer_norm_bwd_kernel(const LayerNormBwd& p);
void softmax_fwd_kernel(const SoftmaxFwd& p);
void softmax_bwd_kernel(const SoftmaxBwd& p);
void masked_softmax_fwd_kernel(const MaskedSoftmaxFwd& p);
void masked_softmax_bwd_kernel(const MaskedSoftmaxBwd& p);
void bias_gelu_fwd_kernel(const BiasGeluFwd& p);
void bias_gelu_bwd_kernel(const BiasGeluBwd& p);
void cross_entropy_absorb_kernel(const CrossEntropyAbsorb& p);
void cross_entropy_finish_kernel(const CrossEntropyFinish& p);
void cross_entropy_bwd_kernel(const CrossEntropyBwd& p);
void matrix_product_kernel(const MatrixProduct& p);
void add_column_sums_kernel(const AddColumnSums& p);
void add_scaled_kernel(const AddScaled& p);
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

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

void attention_fwd(const AttentionFwd& p) {
  active().attention_fwd(p);
}
void attention_bwd(const AttentionBwd& p) {
  active().attention_bwd(p);
}
ContentError varlen_attention_fwd(const VarlenAttentionFwd& p) {
  return active().varlen_attention_fwd(p);
}
ContentError varlen_attention_bwd(const VarlenAttentionBwd& p) {
  return active().varlen_attention_bwd(p);
}
ContentError decode_attention(const DecodeAttention& p) {
  return active().decode_attention(p);
}
void layer_norm_fwd(const LayerNormFwd& p) {
  active().layer_norm_fwd(p);
}
void layer_norm_bwd(const LayerNormBwd& p) {
  active().layer_norm_bwd(p);
}
void softmax_fwd(const SoftmaxFwd& p) {
  active().softmax_fwd(p);
}
void softmax_bwd(const SoftmaxBwd& p) {
  active().softmax_bwd(p);
}
void masked_softmax_fwd(const MaskedSoftmaxFwd& p) {
  active().masked_softmax_fwd(p);
}
void masked_softmax_bwd(const MaskedSoftmaxBwd& p) {
  active().masked_softmax_bwd(p);
}
void bias_gelu_fwd(const BiasGeluFwd& p) {
  active().bias_gelu_fwd(p);
}
void bias_gelu_bwd(const BiasGeluBwd& p) {
  active().bias_gelu_bwd(p);
}
void cross_entropy_absorb(const CrossEntropyAbsorb& p) {
  active().cross_entropy_absorb(p);
}
void cross_entropy_finish(const CrossEntropyFinish& p) {
  active().cross_entropy_finish(p);
}
void cross_entropy_bwd(const CrossEntropyBwd& p) {
  active().cross_entropy_bwd(p);
}
void matrix_product(const MatrixProduct& p) {
  active().matrix_product(p);
}
bool multiplies_bf16() {
  return active().multiplies_bf16;
}
void add_column_sums(const AddColumnSums& p) {
  active().add_column_sums(p);
}
void add_scaled(const AddScaled& p) {
  active().add_scaled(p);
}

}  // namespace cpu
}  // namespace fastgpt

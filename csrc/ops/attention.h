// attention: out = softmax(scale * q k^T + bias - slope * |i' - j|, visible keys) v, dense, packed
// (varlen) and over a cache (decode). Key j is visible to query i, standing at i' = i +
// query_offset, iff (j <= i' when causal) and |i' - j| < window, and no mask hides it. A query that
// sees no key gives output 0, lse -inf and zero gradients. Every tensor has last stride 1 unless
// said otherwise.
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct AttentionInputs {
  TensorRef q;                 // (b, h, sq, d)
  TensorRef k;                 // (b, hk, sk, d)
  TensorRef v;                 // (b, hk, sk, d)
  TensorRef key_padding_mask;  // (b, sk) u8, any strides, 1 = may be seen; or absent
  TensorRef bias;              // (b|1, h|1, sq|1, sk|1) f32, bf16 or f16, any strides; or absent
  TensorRef mask;              // (b|1, h|1, sq|1, sk|1) u8, any strides; or absent
  TensorRef alibi_slopes;      // (h) or (b, h) f32; or absent
  TensorRef dropout_seed;      // one i64; absent without dropout
  float scale;
  double dropout_p;
  bool causal;
  int64_t window;  // 0: none
  int64_t query_offset;
};

// Whether a GPU of this compute capability (90: Hopper) takes it by the kernels for warpgroups
// (wgmma). features: there is more to it than a positive scale, causal and window.
constexpr bool suits_warpgroups(DType dtype, int64_t d, bool features, int capability) {
  return capability == 90 && dtype != DType::f32 && d >= 16 && d <= 256 && !features;
}

struct AttentionFwd {
  AttentionInputs in;
  TensorRef out;     // (b, h, sq, d)
  TensorRef lse;     // (b, h, sq) f32, contiguous
  TensorRef out_lo;  // like out, round(out in f32 - out); or absent
};

struct AttentionBwd {
  AttentionInputs in;
  TensorRef dout;    // (b, h, sq, d)
  TensorRef dlse;    // (b, h, sq) f32, contiguous; or absent
  TensorRef out;     // (b, h, sq, d)
  TensorRef lse;     // (b, h, sq) f32, contiguous
  TensorRef out_lo;  // like out; or absent
  TensorRef dq;      // (b, h, sq, d)
  TensorRef dk;      // (b, hk, sk, d)
  TensorRef dv;      // (b, hk, sk, d)
  TensorRef dbias;   // the shape of bias, f32, contiguous; or absent
};

struct VarlenAttentionInputs {
  TensorRef q;             // (tq, h, d)
  TensorRef k;             // (tk, hk, d)
  TensorRef v;             // (tk, hk, d)
  TensorRef cu_seqlens_q;  // (documents + 1) i32: offsets of the documents in q
  TensorRef cu_seqlens_k;  // (documents + 1) i32
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  float scale;
  bool causal;
  int64_t window;  // 0: none
};

struct VarlenAttentionFwd {
  VarlenAttentionInputs in;
  TensorRef out;     // (tq, h, d)
  TensorRef lse;     // (h, tq) f32, contiguous
  TensorRef out_lo;  // like out; or absent
};

struct VarlenAttentionBwd {
  VarlenAttentionInputs in;
  TensorRef dout;    // (tq, h, d)
  TensorRef dlse;    // (h, tq) f32, contiguous; or absent
  TensorRef out;     // (tq, h, d)
  TensorRef lse;     // (h, tq) f32, contiguous
  TensorRef out_lo;  // like out; or absent
  TensorRef dq;      // (tq, h, d)
  TensorRef dk;      // (tk, hk, d)
  TensorRef dv;      // (tk, hk, d)
};

// The t query rows of a batch element end at its newest key. Position p of the sequence lives in
// slot p of the cache, or p mod capacity in a ring.
struct DecodeAttention {
  TensorRef q;              // (b, h, t, d)
  TensorRef k_cache;        // (b, hk, capacity, d), written when k_new is there
  TensorRef v_cache;        // (b, hk, capacity, d)
  TensorRef cache_lengths;  // (b) i32 or i64: valid keys before the append
  TensorRef k_new;          // (b, hk, t_new, d) or absent
  TensorRef v_new;          // (b, hk, t_new, d) or absent
  TensorRef cache_start;    // (b) i32 or i64, first visible position; or absent
  TensorRef out;            // (b, h, t, d)
  TensorRef lse;            // (b, h, t) f32, contiguous
  float scale;
  int64_t window;  // 0: none
  bool ring;
};

namespace cpu {
void attention_fwd(const AttentionFwd& p);
void attention_bwd(const AttentionBwd& p);
ContentError varlen_attention_fwd(const VarlenAttentionFwd& p);
ContentError varlen_attention_bwd(const VarlenAttentionBwd& p);
ContentError decode_attention(const DecodeAttention& p);
}  // namespace cpu

// On a GPU the contents of tensors are not checked; whatever they hold, no other memory is met.
namespace cuda {
void attention_fwd(const AttentionFwd& p, void* stream);
int64_t attention_bwd_workspace(const AttentionBwd& p);  // floats
void attention_bwd(const AttentionBwd& p, float* workspace, void* stream);
void varlen_attention_fwd(const VarlenAttentionFwd& p, void* stream);
int64_t varlen_attention_bwd_workspace(const VarlenAttentionBwd& p);  // floats
void varlen_attention_bwd(const VarlenAttentionBwd& p, float* workspace, void* stream);
int64_t decode_attention_workspace(const DecodeAttention& p);  // floats
void decode_attention(const DecodeAttention& p, float* workspace, void* stream);
}  // namespace cuda

}  // namespace fastgpt

// The heads of (b, h, s, d) tensors.
#pragma once

#include "csrc/common/math.h"
#include "csrc/cpu/attention_head.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

// Head h of batch element b of a (b, h, s, d) tensor; null if the tensor is absent.
inline Rows head_rows(const TensorRef& t, int64_t b, int64_t h) {
  if (!t) return Rows{};
  const int64_t at = b * t.stride[0] + h * t.stride[1];
  return Rows{static_cast<char*>(t.data) + at * element_size(t.dtype), t.stride[2], 0};
}

// The (sq, sk) plane of a (b|1, h|1, sq|1, sk|1) tensor.
inline Plane head_plane(const TensorRef& t, int64_t b, int64_t h) {
  if (!t) return Plane{};
  const int64_t at =
      (t.size[0] == 1 ? 0 : b) * t.stride[0] + (t.size[1] == 1 ? 0 : h) * t.stride[1];
  const int bytes = t.dtype == DType::u8 ? 1 : element_size(t.dtype);
  return Plane{static_cast<const char*>(t.data) + at * bytes, t.dtype,
               t.size[2] == 1 ? 0 : t.stride[2], t.size[3] == 1 ? 0 : t.stride[3]};
}

// A window that reaches every key from every query is none.
inline int64_t effective_window(int64_t window, int64_t sq, int64_t sk, int64_t offset) {
  return window > sq + sk + (offset < 0 ? -offset : offset) ? 0 : window;
}

inline Head dense_head(const AttentionInputs& in, int64_t b, int64_t h) {
  const int64_t heads = in.q.size[1], group = heads / in.k.size[1];
  Head head;
  head.dtype = head.kv_dtype = in.q.dtype;
  head.d = static_cast<int>(in.q.size[3]);
  head.sq = in.q.size[2];
  head.sk = in.k.size[2];
  head.offset = in.query_offset;
  head.causal = in.causal;
  head.window = effective_window(in.window, head.sq, head.sk, head.offset);
  head.scale = in.scale;
  head.q = head_rows(in.q, b, h);
  head.k = head_rows(in.k, b, h / group);
  head.v = head_rows(in.v, b, h / group);
  if (in.key_padding_mask) {
    head.key_visible_stride = in.key_padding_mask.stride[1];
    head.key_visible =
        static_cast<const uint8_t*>(in.key_padding_mask.data) + b * in.key_padding_mask.stride[0];
  }
  head.bias = head_plane(in.bias, b, h);
  head.mask = head_plane(in.mask, b, h);
  if (in.alibi_slopes) {
    head.alibi = true;
    const TensorRef& slopes = in.alibi_slopes;
    const int64_t at =
        slopes.ndim == 2 ? b * slopes.stride[0] + h * slopes.stride[1] : h * slopes.stride[0];
    head.slope = static_cast<const float*>(slopes.data)[at];
  }
  if (in.dropout_p > 0.0 && in.dropout_seed) {
    const uint64_t seed = *static_cast<const uint64_t*>(in.dropout_seed.data);
    head.dropout.on = true;
    head.dropout.key[0] = static_cast<uint32_t>(seed);
    head.dropout.key[1] = static_cast<uint32_t>(seed >> 32);
    head.dropout.head = static_cast<uint32_t>(b * heads + h);
    head.dropout.threshold = dropout_threshold(in.dropout_p);
    head.dropout.scale = static_cast<float>(1.0 / (1.0 - in.dropout_p));
  }
  return head;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

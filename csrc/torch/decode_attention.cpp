#include "csrc/ops/attention.h"
#include "csrc/torch/attention_common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

// The counts (b) of a batch, i32 or i64; or none.
TensorRef view_counts(const std::optional<Tensor>& t, const char* argument, int64_t b) {
  const TensorRef r = view(t);
  require(!r || ((r.dtype == DType::i32 || r.dtype == DType::i64) && has_size(r, {b}) &&
                 is_contiguous(r)),
          argument);
  return r;
}

std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache,
                                            Tensor cache_lengths, std::optional<Tensor> k_new,
                                            std::optional<Tensor> v_new, double scale,
                                            std::optional<int64_t> window,
                                            std::optional<Tensor> cache_start, bool ring) {
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3);
  Tensor out = token_major(q, b, h, t, d);
  Tensor lse = empty(q, {b, h, t}, ScalarType::Float);
  if (q.numel() == 0) return {out, lse};
  const TensorRef queries = view_input(q, "q", 4);
  const DType dtype = queries.dtype;
  const int64_t hk = k_cache.size(1), capacity = k_cache.size(2);
  const int64_t t_new = k_new.has_value() ? k_new->size(2) : 0;
  require_groups(h, hk);
  require(!ring || capacity > 0, "k_cache");
  require(!ring || t_new <= capacity, "k_new");
  require(k_new.has_value() == v_new.has_value(), "v_new");
  require(on_device(q, k_cache) && on_device(q, v_cache) && on_device(q, cache_lengths) &&
              on_device(q, k_new) && on_device(q, v_new) && on_device(q, cache_start),
          "q");
  const DecodeAttention p{queries,
                          view_rows(k_cache, "k_cache", dtype, {b, hk, capacity, d}),
                          view_rows(v_cache, "v_cache", dtype, {b, hk, capacity, d}),
                          view_counts(cache_lengths, "cache_lengths", b),
                          view_rows(k_new, "k_new", dtype, {b, hk, t_new, d}),
                          view_rows(v_new, "v_new", dtype, {b, hk, t_new, d}),
                          view_counts(cache_start, "cache_start", b),
                          view(out),
                          view(lse),
                          static_cast<float>(scale),
                          window.value_or(0),
                          ring};
  run_on_device_of(
      q, [&] { check_contents(cpu::decode_attention(p)); },
      [&](void* stream) {
        Tensor workspace = empty(q, {cuda::decode_attention_workspace(p)}, ScalarType::Float);
        cuda::decode_attention(p, static_cast<float*>(view(workspace).data), stream);
      });
  return {out, lse};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("decode_attention", FASTGPT_BOX(decode_attention));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding

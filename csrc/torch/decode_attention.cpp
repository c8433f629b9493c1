#include "csrc/ops/attention.h"
#include "csrc/torch/attention_common.h"

namespace fastgpt::binding {
namespace {

std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k_cache, Tensor v_cache,
                                            Tensor cache_lengths, std::optional<Tensor> k_new,
                                            std::optional<Tensor> v_new, double scale,
                                            std::optional<int64_t> window,
                                            std::optional<Tensor> cache_start, bool ring) {
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), d = q.size(3);
  Tensor out = token_major(q, b, h, t, d);
  Tensor lse = empty(q, {b, h, t}, ScalarType::Float);
  if (q.numel() != 0) {
    check_contents(
        cpu::decode_attention({view(q), view(k_cache), view(v_cache), view(cache_lengths),
                               view(k_new), view(v_new), view(cache_start), view(out), view(lse),
                               static_cast<float>(scale), window.value_or(0), ring}));
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace fastgpt::binding

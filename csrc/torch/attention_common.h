// What the attention bindings share.
#pragma once

#include "csrc/torch/common.h"

namespace fastgpt::binding {

// A new (b, h, s, d) tensor stored as (b, s, h, d).
inline Tensor token_major(const Tensor& like, int64_t b, int64_t h, int64_t s, int64_t d) {
  const auto some = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t row = some(h) * some(d);
  const int64_t stride[] = {some(s) * row, some(d), row, 1};
  return empty_strided(like, {b, h, s, d}, stride, like.scalar_type());
}

// Each of the hk key heads serves the same number of query heads.
inline void require_groups(int64_t h, int64_t hk) {
  require(hk > 0 && h % hk == 0, "k");
}

// float32 outputs lose nothing that out_lo could keep.
inline bool stores_out_lo(const Tensor& q, bool need_out_lo) {
  return need_out_lo && q.scalar_type() != ScalarType::Float;
}

}  // namespace fastgpt::binding

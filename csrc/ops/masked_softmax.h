// masked_softmax: softmax(scale * scores) over the band that each query sees, 0 elsewhere. Query i
// sits at i' = i + sk - sq and sees key j iff (j <= i' when causal) and |i' - j| < window.
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct Band {
  bool causal;
  int64_t window;  // 0: dense
};

struct MaskedSoftmaxFwd {
  TensorRef scores;  // (r, sq, sk); last stride 1, as in every tensor below
  TensorRef y;       // (r, sq, sk) in the dtype of scores or f32
  float scale;
  Band band;
};

struct MaskedSoftmaxBwd {
  TensorRef dy;       // (r, sq, sk)
  TensorRef y;        // (r, sq, sk) in dy's dtype
  TensorRef dscores;  // (r, sq, sk) in y's dtype or narrower
  float scale;
  Band band;
};

namespace cpu {
void masked_softmax_fwd(const MaskedSoftmaxFwd& p);
void masked_softmax_bwd(const MaskedSoftmaxBwd& p);
}  // namespace cpu

namespace cuda {
void masked_softmax_fwd(const MaskedSoftmaxFwd& p, void* stream);
void masked_softmax_bwd(const MaskedSoftmaxBwd& p, void* stream);
}  // namespace cuda

}  // namespace fastgpt

// softmax: y = exp(x) / sum(exp(x)) over the last axis of x (r, n).
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct SoftmaxFwd {
  TensorRef x;  // (r, n); last stride 1, as in every tensor below
  TensorRef y;  // (r, n) in x's dtype or f32
};

struct SoftmaxBwd {
  TensorRef dy;  // (r, n)
  TensorRef y;   // (r, n) in dy's dtype
  TensorRef dx;  // (r, n) in y's dtype or narrower
};

namespace cpu {
void softmax_fwd(const SoftmaxFwd& p);
void softmax_bwd(const SoftmaxBwd& p);
}  // namespace cpu

namespace cuda {
void softmax_fwd(const SoftmaxFwd& p, void* stream);
void softmax_bwd(const SoftmaxBwd& p, void* stream);
}  // namespace cuda

}  // namespace fastgpt

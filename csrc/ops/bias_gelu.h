// bias_gelu: y = gelu(x + bias), x (r, n).
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct BiasGeluFwd {
  TensorRef x;     // (r, n); last stride 1, as in every tensor of rows below
  TensorRef bias;  // (n) in x's dtype or f32, or absent
  TensorRef y;     // (r, n)
  bool tanh;       // the tanh approximation, else erf
};

struct BiasGeluBwd {
  TensorRef dy;     // (r, n)
  TensorRef x;      // (r, n)
  TensorRef bias;   // (n) or absent
  TensorRef dx;     // (r, n)
  TensorRef dbias;  // (n) f32, or absent
  bool tanh;
};

namespace cpu {
void bias_gelu_fwd(const BiasGeluFwd& p);
void bias_gelu_bwd(const BiasGeluBwd& p);
}  // namespace cpu

namespace cuda {
void bias_gelu_fwd(const BiasGeluFwd& p, void* stream);
// workspace: bias_gelu_bwd_workspace(r, n) floats.
int64_t bias_gelu_bwd_workspace(int64_t r, int64_t n);
void bias_gelu_bwd(const BiasGeluBwd& p, float* workspace, void* stream);
}  // namespace cuda

}  // namespace fastgpt

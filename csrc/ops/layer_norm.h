// layer_norm: y = (x - mean) * rstd * weight + bias over the last axis of x (r, n).
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct LayerNormFwd {
  TensorRef x;         // (r, n); last stride 1, as in every tensor of rows below
  TensorRef residual;  // (r, n) or absent: then x + residual is normalized, rounded to x's dtype
  TensorRef s;         // (r, n) the rounded sum; absent without residual
  TensorRef weight;    // (n) in x's dtype or f32, or absent
  TensorRef bias;      // (n) likewise
  TensorRef y;         // (r, n) in x's dtype or f32
  TensorRef mean;      // (r) f32
  TensorRef rstd;      // (r) f32
  float eps;
};

struct LayerNormBwd {
  TensorRef dy;       // (r, n) in y's dtype
  TensorRef x;        // (r, n)
  TensorRef weight;   // (n) or absent
  TensorRef mean;     // (r) f32
  TensorRef rstd;     // (r) f32
  TensorRef ds;       // (r, n) in x's dtype, added to dx, or absent
  TensorRef dx;       // (r, n)
  TensorRef dweight;  // (n) f32, or absent
  TensorRef dbias;    // (n) f32, or absent
};

namespace cpu {
void layer_norm_fwd(const LayerNormFwd& p);
void layer_norm_bwd(const LayerNormBwd& p);
}  // namespace cpu

namespace cuda {
void layer_norm_fwd(const LayerNormFwd& p, void* stream);
// workspace: layer_norm_bwd_workspace(r, n) floats.
int64_t layer_norm_bwd_workspace(int64_t r, int64_t n);
void layer_norm_bwd(const LayerNormBwd& p, float* workspace, void* stream);
}  // namespace cuda

}  // namespace fastgpt

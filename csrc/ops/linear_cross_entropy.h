// linear_cross_entropy: cross_entropy(x @ weight^T + bias) in blocks of rows and classes: a matrix
// product, then the loss of the block (csrc/ops/cross_entropy.h), and two more products backward.
// On GPUs the products are torch's own.
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

// c = a b (+ bias), or c += a b. Of the strides of a and of b at least one is 1.
struct MatrixProduct {
  TensorRef a;     // (m, k) f32, bf16 or f16
  TensorRef b;     // (k, n) likewise
  TensorRef bias;  // (n) f32, contiguous, with add == false only; or absent
  TensorRef c;     // (m, n) f32, last stride 1
  bool add;
};

struct AddColumnSums {
  TensorRef x;    // (r, n) f32, last stride 1
  TensorRef sum;  // (n) f32: gains the sum of x over its rows
};

// to = factor (a + b), rounded to the dtype of `to`, which may be a or b.
struct AddScaled {
  TensorRef a;          // (r, n) f32, last stride 1, all rows one where its first stride is 0;
                        // or absent
  TensorRef b;          // (r, n) f32, last stride 1
  TensorRef to;         // (r, n) f32, bf16 or f16, last stride 1
  TensorRef numerator;  // () f32, or absent: 1
  TensorRef divisor;    // () f32, or absent: 1; where it is 0 the factor is 0
};

namespace cpu {
void matrix_product(const MatrixProduct& p);
// Whether it multiplies bf16 faster than floats.
bool multiplies_bf16();
void add_column_sums(const AddColumnSums& p);
void add_scaled(const AddScaled& p);
}  // namespace cpu

namespace cuda {
void add_scaled(const AddScaled& p, void* stream);
// workspace: add_column_sums_workspace(r, n) floats.
int64_t add_column_sums_workspace(int64_t r, int64_t n);
void add_column_sums(const AddColumnSums& p, float* workspace, void* stream);
}  // namespace cuda

}  // namespace fastgpt

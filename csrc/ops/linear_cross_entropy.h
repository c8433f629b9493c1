// linear_cross_entropy: cross_entropy(x @ weight^T + bias) in blocks of rows and classes: a matrix
// product, then the loss of the block (csrc/ops/cross_entropy.h), and two more products backward.
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

namespace cpu {
void matrix_product(const MatrixProduct& p);
void add_column_sums(const AddColumnSums& p);
}  // namespace cpu

}  // namespace fastgpt

// linear_cross_entropy: cross_entropy(x @ weight^T + bias) in blocks of rows and classes. The
// products are the library's; csrc/ops/cross_entropy.h has the loss of a block.
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

struct AddColumnSums {
  TensorRef x;    // (r, n) f32, last stride 1
  TensorRef sum;  // (n) f32: gains the sum of x over its rows
};

namespace cpu {
void add_column_sums(const AddColumnSums& p);
}  // namespace cpu

}  // namespace fastgpt

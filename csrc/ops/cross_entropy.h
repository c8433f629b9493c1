// cross_entropy: loss_i = (1 - e) w_t (lse_i - x_it) + e / v sum_j w_j (lse_i - x_ij), with t the
// target of row i, e the label smoothing, w the class weights. The classes may come in blocks: the
// same kernels serve whole logits (one block) and linear_cross_entropy (many).
#pragma once

#include "csrc/ops/tensor_ref.h"

namespace fastgpt {

enum class Reduction : int8_t { none, mean, sum };

struct CrossEntropyOptions {
  int64_t classes;       // v, over all blocks
  int64_t ignore_index;  // rows with this target are not read; loss, lse and gradient are 0
  Reduction reduction;
  double label_smoothing;
};

// What the forward knows of one row after the blocks absorbed so far.
struct CrossEntropyRow {
  double weighted;  // sum of w_j x_j; only kept under label smoothing
  float top;        // max of x_j
  float sum;        // sum of exp(x_j - top)
  float picked;     // x_t, once its block has come
};

struct CrossEntropyAbsorb {
  TensorRef x;       // (r, n): classes first_class to first_class + n; last stride 1
  TensorRef target;  // (r) i64, each a class or ignore_index
  TensorRef weight;  // (v) f32 or absent
  int64_t first_class;
  CrossEntropyOptions options;
  CrossEntropyRow* rows;  // (r); begun by the block of first_class 0
};

struct CrossEntropyFinish {
  const CrossEntropyRow* rows;  // (r)
  TensorRef target;             // (r) i64
  TensorRef weight;             // (v) f32 or absent
  CrossEntropyOptions options;
  TensorRef row_loss;    // (r) f32; the loss itself for Reduction::none
  TensorRef loss;        // () f32, for mean and sum
  TensorRef lse;         // (r) f64: x - lse in float32 keeps its digits however far x is from 0
  TensorRef weight_sum;  // () f32: the sum of w_t
};

struct CrossEntropyBwd {
  TensorRef dloss;       // (r) for Reduction::none, else () or absent: 1; f32
  TensorRef x;           // (r, n), as absorbed
  TensorRef target;      // (r) i64
  TensorRef weight;      // (v) f32 or absent
  TensorRef lse;         // (r) f64
  TensorRef weight_sum;  // () f32
  TensorRef dx;          // (r, n) in x's dtype, may be x itself; or bf16 where x is f32; on GPUs
                         // also f16
  int64_t first_class;
  CrossEntropyOptions options;
};

namespace cpu {
void cross_entropy_absorb(const CrossEntropyAbsorb& p);
void cross_entropy_finish(const CrossEntropyFinish& p);
void cross_entropy_bwd(const CrossEntropyBwd& p);
}  // namespace cpu

namespace cuda {
void cross_entropy_absorb(const CrossEntropyAbsorb& p, void* stream);
void cross_entropy_finish(const CrossEntropyFinish& p, void* stream);
// workspace: one double.
void cross_entropy_bwd(const CrossEntropyBwd& p, double* workspace, void* stream);
}  // namespace cuda

}  // namespace fastgpt

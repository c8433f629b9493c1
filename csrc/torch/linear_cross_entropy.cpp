// Blocks of classes outside, blocks of rows inside: float32 logits of one block at a time, which
// the cross-entropy kernels absorb, or turn into their gradient in place. The gradient of weight is
// summed in float32 and rounded once a block. Scratch is at most about 64 MiB, whatever the number
// of rows and classes.
// Flops: 2 r v c forward, 6 r v c backward (the logits are computed again).
#include "csrc/ops/linear_cross_entropy.h"

#include <algorithm>

#include "csrc/torch/common.h"
#include "csrc/torch/losses.h"

namespace fastgpt::binding {
namespace {

constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockClasses = 4096;
constexpr int64_t kBlockElements = 1 << 22;  // of a float32 block of weight, 16 MiB

// Rows [first, first + count) of a matrix, or elements of a vector.
TensorRef rows_of(TensorRef t, int64_t first, int64_t count) {
  const int64_t bytes = t.dtype == DType::i64 || t.dtype == DType::f64 ? 8
                        : t.dtype == DType::f32                        ? 4
                                                                       : 2;
  t.data = static_cast<char*>(t.data) + first * t.stride[0] * bytes;
  t.size[0] = count;
  return t;
}

TensorRef transposed(TensorRef t) {
  std::swap(t.size[0], t.size[1]);
  std::swap(t.stride[0], t.stride[1]);
  return t;
}

// The block of rows and classes under way, and its logits, always in the same buffer.
class Blocks {
 public:
  Blocks(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias)
      : x_(view_input(x, "x", 2)),
        weight_(view_rows(weight, "weight", x_.dtype, {weight.size(0), x_.size[1]})),
        rows_(std::max(std::min(kBlockRows, x_.size[0]), int64_t{1})),
        classes_(std::max(
            std::min({kBlockElements / (x_.size[1] + 1) + 1, kBlockClasses, weight_.size[0]}),
            int64_t{1})),
        buffer_(empty(x, {rows_, classes_}, ScalarType::Float)) {
    x_.stride[1] = weight_.stride[1] = 1;  // whatever it was where c is 1
    if (bias.has_value()) {
      bias_ = torch::stable::to(*bias, ScalarType::Float);
      view_flat(*bias_, "bias", DType::f32, {weight_.size[0]});
    }
  }

  // visit(first class, number of classes) for the blocks of classes in ascending order.
  template <typename Visit>
  void over_classes(const Visit& visit) const {
    if (x_.size[0] == 0) return;
    for (int64_t j = 0; j < weight_.size[0]; j += classes_) {
      visit(j, std::min(classes_, weight_.size[0] - j));
    }
  }

  // visit(first row, number of rows) likewise.
  template <typename Visit>
  void over_rows(const Visit& visit) const {
    for (int64_t i = 0; i < x_.size[0]; i += rows_) visit(i, std::min(rows_, x_.size[0] - i));
  }

  TensorRef x(int64_t i, int64_t rows) const { return rows_of(x_, i, rows); }
  TensorRef weight(int64_t j, int64_t classes) const { return rows_of(weight_, j, classes); }
  int64_t most_classes() const { return classes_; }

  // x (rows, c) weight (classes, c)^T + bias.
  TensorRef logits(int64_t i, int64_t rows, int64_t j, int64_t classes) const {
    TensorRef out = view(buffer_);
    out.size[0] = rows;
    out.size[1] = classes;
    const TensorRef bias = bias_.has_value() ? rows_of(view(*bias_), j, classes) : TensorRef{};
    cpu::matrix_product({x(i, rows), transposed(weight(j, classes)), bias, out, false});
    return out;
  }

 private:
  TensorRef x_, weight_;
  int64_t rows_, classes_;
  Tensor buffer_;
  std::optional<Tensor> bias_;
};

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd(Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias,
                                                            Tensor target, int64_t ignore_index,
                                                            int64_t reduction,
                                                            double label_smoothing) {
  const CrossEntropyOptions options{weight.size(0), ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, x.size(0), options);
  const Blocks blocks(x, weight, bias);
  const TensorRef targets = view(target);
  const Tensor rows = empty_rows(x, x.size(0));
  blocks.over_classes([&](int64_t j, int64_t classes) {
    blocks.over_rows([&](int64_t i, int64_t count) {
      cpu::cross_entropy_absorb({blocks.logits(i, count, j, classes), rows_of(targets, i, count),
                                 TensorRef{}, j, options, row_states(rows) + i});
    });
  });
  const CrossEntropyResult result = finish(target, TensorRef{}, options, rows);
  return {result.loss, result.lse, result.weight_sum};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(
    Tensor dloss, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, Tensor lse,
    Tensor weight_sum, int64_t ignore_index, int64_t reduction, double label_smoothing,
    bool need_dx, bool need_dweight, bool need_dbias) {
  const int64_t r = x.size(0), c = x.size(1), v = weight.size(0);
  const CrossEntropyOptions options{v, ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, r, options);
  const TensorRef dlosses = view_dloss(dloss, r, options.reduction);
  const TensorRef lses = view_flat(lse, "lse", DType::f64, {r});
  const TensorRef total = view_flat(weight_sum, "weight_sum", DType::f32, {});
  const TensorRef targets = view(target);
  const Blocks blocks(x, weight, bias);

  Tensor dx = need_dx ? empty(x, {r, c}, ScalarType::Float) : empty(x, {0});
  Tensor dweight = need_dweight ? empty(weight, {v, c}) : empty(weight, {0});
  Tensor dbias = empty(x, {need_dbias ? v : 0}, ScalarType::Float);
  torch::stable::zero_(dbias);
  if (r == 0) torch::stable::zero_(dweight);
  std::optional<Tensor> dweight_sum;
  if (need_dweight && weight.scalar_type() != ScalarType::Float) {
    dweight_sum = empty(weight, {blocks.most_classes(), c}, ScalarType::Float);
  }

  blocks.over_classes([&](int64_t j, int64_t classes) {
    TensorRef dweight_block;
    if (need_dweight) {
      dweight_block = dweight_sum.has_value() ? rows_of(view(*dweight_sum), 0, classes)
                                              : rows_of(view(dweight), j, classes);
    }
    blocks.over_rows([&](int64_t i, int64_t count) {
      const TensorRef block = blocks.logits(i, count, j, classes);
      const bool each = options.reduction == Reduction::none;
      cpu::cross_entropy_bwd({each ? rows_of(dlosses, i, count) : dlosses, block,
                              rows_of(targets, i, count), TensorRef{}, rows_of(lses, i, count),
                              total, block, j, options});
      if (need_dx) {
        cpu::matrix_product(
            {block, blocks.weight(j, classes), TensorRef{}, rows_of(view(dx), i, count), j > 0});
      }
      if (need_dweight) {
        cpu::matrix_product(
            {transposed(block), blocks.x(i, count), TensorRef{}, dweight_block, i > 0});
      }
      if (need_dbias) cpu::add_column_sums({block, rows_of(view(dbias), j, classes)});
    });
    if (dweight_sum.has_value()) {
      Tensor rounded = torch::stable::narrow(dweight, 0, j, classes);
      torch::stable::copy_(rounded, torch::stable::narrow(*dweight_sum, 0, 0, classes));
    }
  });
  if (x.scalar_type() != ScalarType::Float) dx = torch::stable::to(dx, x.scalar_type());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace fastgpt::binding

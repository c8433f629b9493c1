// Blocks of classes outside, blocks of rows inside: float32 logits of one block at a time, from
// torch's matrix product, then the cross-entropy kernels. A block of weight is brought to float32
// once each way, and its gradient is summed in float32 and rounded once. Scratch is at most about
// 64 MiB, whatever the number of rows and classes.
// Flops: 2 r v c forward, 6 r v c backward (the logits are computed again).
#include "csrc/ops/linear_cross_entropy.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "csrc/torch/common.h"
#include "csrc/torch/losses.h"

namespace fastgpt::binding {
namespace {

constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockClasses = 4096;
constexpr int64_t kBlockElements = 1 << 22;  // of a block's rows of x or weight, 16 MiB in float32

// How many of the rows of a matrix make a block; the last one may be shorter.
int64_t block_size(int64_t most, const Tensor& matrix) {
  const int64_t fitting = std::min(kBlockElements / (matrix.size(1) + 1) + 1, most);
  return std::max(std::min(fitting, matrix.size(0)), int64_t{1});
}

int64_t clipped(int64_t first, int64_t block, int64_t end) {
  return std::min(block, end - first);
}

Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

// The leading (rows, columns) corner of a block's buffer.
Tensor corner(const Tensor& buffer, int64_t rows, int64_t columns) {
  Tensor whole = rows_of(buffer, 0, rows);
  return torch::stable::narrow(whole, 1, 0, columns);
}

Tensor transposed(const Tensor& t) {
  return torch::stable::transpose(t, 0, 1);
}

// out = a @ b, or out += a @ b. Through the CPU shim, which no autocast region reaches.
void multiply(const Tensor& a, const Tensor& b, bool add, const Tensor& out) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// Blocks of rows of a matrix in float32: views if that is its dtype, else copies in one buffer.
class FloatRows {
 public:
  FloatRows(const Tensor& source, int64_t block) : source_(source) {
    if (narrow()) buffer_ = empty(source, {block, source.size(1)}, ScalarType::Float);
  }

  Tensor at(int64_t first, int64_t count) const {
    const Tensor rows = rows_of(source_, first, count);
    if (!narrow()) return rows;
    Tensor floats = rows_of(*buffer_, 0, count);
    return torch::stable::copy_(floats, rows);
  }

 private:
  bool narrow() const { return source_.scalar_type() != ScalarType::Float; }

  Tensor source_;
  std::optional<Tensor> buffer_;
};

// The logits of any block of rows and classes, always in the same buffer.
class Logits {
 public:
  Logits(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias)
      : block_rows(block_size(kBlockRows, x)),
        block_classes(block_size(kBlockClasses, weight)),
        buffer_(empty(x, {block_rows, block_classes}, ScalarType::Float)) {
    if (bias.has_value()) bias_ = torch::stable::to(*bias, ScalarType::Float);
  }

  // x (rows, c) and weight (classes, c) in float32; these classes begin at first_class.
  Tensor of(const Tensor& x, const Tensor& weight, int64_t first_class) const {
    const Tensor out = corner(buffer_, x.size(0), weight.size(0));
    if (bias_.has_value()) {
      const Tensor bias = rows_of(*bias_, first_class, weight.size(0));
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias.get(), x.get(),
                                                             transposed(weight).get(), 1.0, 1.0));
    } else {
      multiply(x, transposed(weight), false, out);
    }
    return out;
  }

  const int64_t block_rows, block_classes;

 private:
  Tensor buffer_;
  std::optional<Tensor> bias_;
};

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_fwd(Tensor x, Tensor weight,
                                                            std::optional<Tensor> bias,
                                                            Tensor target, int64_t ignore_index,
                                                            int64_t reduction,
                                                            double label_smoothing) {
  const int64_t r = x.size(0), v = weight.size(0);
  const CrossEntropyOptions options{v, ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, r, options);
  const Logits logits(x, weight, bias);
  const FloatRows x_rows(x, logits.block_rows), weight_rows(weight, logits.block_classes);
  std::vector<CrossEntropyRow> rows(r);
  for (int64_t j = 0; j < v && r > 0; j += logits.block_classes) {
    const Tensor weight_block = weight_rows.at(j, clipped(j, logits.block_classes, v));
    for (int64_t i = 0; i < r; i += logits.block_rows) {
      const int64_t count = clipped(i, logits.block_rows, r);
      const Tensor block = logits.of(x_rows.at(i, count), weight_block, j);
      cpu::cross_entropy_absorb(
          {view(block), view(rows_of(target, i, count)), TensorRef{}, j, options, rows.data() + i});
    }
  }
  const CrossEntropyResult result = finish(target, TensorRef{}, options, rows.data());
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
  view_dloss(dloss, r, options.reduction);
  view_flat(lse, "lse", DType::f64, {r});
  const TensorRef total = view_flat(weight_sum, "weight_sum", DType::f32, {});
  const Logits logits(x, weight, bias);
  const FloatRows x_rows(x, logits.block_rows), weight_rows(weight, logits.block_classes);
  const bool floats = weight.scalar_type() == ScalarType::Float;

  Tensor dx = need_dx ? empty(x, {r, c}, ScalarType::Float) : empty(x, {0});
  Tensor dweight = need_dweight ? empty(weight, {v, c}) : empty(weight, {0});
  Tensor dbias = empty(x, {need_dbias ? v : 0}, ScalarType::Float);
  torch::stable::zero_(dbias);
  if (r == 0) torch::stable::zero_(dweight);
  std::optional<Tensor> dweight_sum;
  if (need_dweight && !floats) {
    dweight_sum = empty(weight, {logits.block_classes, c}, ScalarType::Float);
  }

  for (int64_t j = 0; j < v && r > 0; j += logits.block_classes) {
    const int64_t classes = clipped(j, logits.block_classes, v);
    const Tensor weight_block = weight_rows.at(j, classes);
    Tensor dweight_block = dweight;
    if (need_dweight) {
      dweight_block = floats ? rows_of(dweight, j, classes) : rows_of(*dweight_sum, 0, classes);
    }
    for (int64_t i = 0; i < r; i += logits.block_rows) {
      const int64_t count = clipped(i, logits.block_rows, r);
      const Tensor x_block = x_rows.at(i, count);
      const Tensor block = logits.of(x_block, weight_block, j);
      const Tensor row_dloss =
          options.reduction == Reduction::none ? rows_of(dloss, i, count) : dloss;
      const TensorRef in_place = view(block);
      cpu::cross_entropy_bwd({view(row_dloss), in_place, view(rows_of(target, i, count)),
                              TensorRef{}, view(rows_of(lse, i, count)), total, in_place, j,
                              options});
      if (need_dx) multiply(block, weight_block, j > 0, rows_of(dx, i, count));
      if (need_dweight) multiply(transposed(block), x_block, i > 0, dweight_block);
      if (need_dbias) cpu::add_column_sums({in_place, view(rows_of(dbias, j, classes))});
    }
    if (need_dweight && !floats) {
      Tensor rounded = rows_of(dweight, j, classes);
      torch::stable::copy_(rounded, dweight_block);
    }
  }
  if (x.scalar_type() != ScalarType::Float) dx = torch::stable::to(dx, x.scalar_type());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace fastgpt::binding

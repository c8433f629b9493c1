// Blocks of classes outside, blocks of rows inside: float32 logits of one block at a time, which
// the cross-entropy kernels absorb, or turn into their gradient. The gradients of x and of weight
// are summed in float32 and rounded once. Scratch does not grow with the number of rows or classes:
// at most about 64 MiB on the CPU; on a GPU 64 MiB of logits, and backward 160 MiB more of factors,
// products and sums where c is 4096.
// A GPU, and a CPU that multiplies bf16, take dlogits rounded to the dtype of x. A factor that all
// rows share waits for the end on a GPU, so that they have the size of p, and not of p / r, which
// float16 could not hold.
// Flops: 2 r v c forward, 6 r v c backward (the logits are computed again).
#include "csrc/ops/linear_cross_entropy.h"

#include <algorithm>

#include "csrc/torch/common.h"
#include "csrc/torch/library_product.h"
#include "csrc/torch/losses.h"

namespace fastgpt::binding {
namespace {

struct BlockSizes {
  int64_t rows, classes;
  int64_t elements;  // of a float32 block of weight, if that makes fewer classes
  int64_t step;      // divides the classes of all blocks but the last, and the step of their rows
};
constexpr BlockSizes kCpuBlocks{512, 4096, 1 << 22, 1};
constexpr BlockSizes kCudaBlocks{4096, 4096, 1 << 24, 64};

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

// A vector as a matrix of so many equal rows.
TensorRef repeated(TensorRef t, int64_t rows) {
  t.ndim = 2;
  t.size[1] = t.size[0];
  t.stride[1] = 1;
  t.size[0] = rows;
  t.stride[0] = 0;
  return t;
}

void multiply(const MatrixProduct& p, const Tensor& like) {
  run_on_device_of(
      like, [&] { cpu::matrix_product(p); },
      [&](void* stream) {
        if (has_no_elements(p.c)) return;
        if (p.add) {
          const Tensor part = empty(like, {p.c.size[0], p.c.size[1]}, ScalarType::Float);
          library_product(p.a, p.b, view(part), like);
          cuda::add_scaled({p.c, view(part), p.c, TensorRef{}, TensorRef{}}, stream);
          return;
        }
        library_product(p.a, p.b, p.c, like);
        if (!p.bias) return;
        const TensorRef bias = repeated(p.bias, p.c.size[0]);
        cuda::add_scaled({bias, p.c, p.c, TensorRef{}, TensorRef{}}, stream);
      });
}

// The block of rows and classes under way, and its logits, always in the same buffer.
class Blocks {
 public:
  Blocks(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias)
      : x_(view_input(x, "x", 2)),
        weight_(view_rows(weight, "weight", x_.dtype, {weight.size(0), x_.size[1]})),
        sizes_(runs_cuda_kernels(x) ? kCudaBlocks : kCpuBlocks),
        rows_(std::max(std::min(sizes_.rows, x_.size[0]), int64_t{1})),
        classes_(std::max(std::min(most_classes(sizes_, x_.size[1]), weight_.size[0]), int64_t{1})),
        buffer_(empty_block(x, ScalarType::Float)) {
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
  int64_t classes() const { return classes_; }
  DType dtype() const { return x_.dtype; }

  // Memory for a block of logits, and the part of it that a block of this size takes.
  Tensor empty_block(const Tensor& like, ScalarType dtype) const {
    return empty(like, {rows_, (classes_ + sizes_.step - 1) / sizes_.step * sizes_.step}, dtype);
  }
  static TensorRef part_of(const Tensor& block, int64_t rows, int64_t classes) {
    TensorRef part = view(block);
    part.size[0] = rows;
    part.size[1] = classes;
    return part;
  }

  // x (rows, c) weight (classes, c)^T + bias.
  TensorRef logits(int64_t i, int64_t rows, int64_t j, int64_t classes) const {
    const TensorRef out = part_of(buffer_, rows, classes);
    const TensorRef bias = bias_.has_value() ? rows_of(view(*bias_), j, classes) : TensorRef{};
    multiply({x(i, rows), transposed(weight(j, classes)), bias, out, false}, buffer_);
    return out;
  }

 private:
  static int64_t most_classes(const BlockSizes& sizes, int64_t c) {
    const int64_t most = std::min(sizes.elements / (c + 1) + 1, sizes.classes);
    return std::max(most / sizes.step, int64_t{1}) * sizes.step;
  }

  TensorRef x_, weight_;
  BlockSizes sizes_;
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
  require(on_device(x, weight) && on_device(x, bias) && on_device(x, target), "x");
  const Blocks blocks(x, weight, bias);
  const TensorRef targets = view(target);
  const Tensor rows = empty_rows(x, x.size(0));
  blocks.over_classes([&](int64_t j, int64_t classes) {
    blocks.over_rows([&](int64_t i, int64_t count) {
      const CrossEntropyAbsorb p{blocks.logits(i, count, j, classes),
                                 rows_of(targets, i, count),
                                 TensorRef{},
                                 j,
                                 options,
                                 row_states(rows) + i};
      run_on_device_of(
          x, [&] { cpu::cross_entropy_absorb(p); },
          [&](void* stream) { cuda::cross_entropy_absorb(p, stream); });
    });
  });
  const CrossEntropyResult result = finish(target, TensorRef{}, options, rows);
  return {result.loss, result.lse, result.weight_sum};
}

void turn_into_gradient(const CrossEntropyBwd& p, const Tensor& like) {
  run_on_device_of(
      like, [&] { cpu::cross_entropy_bwd(p); },
      [&](void* stream) {
        const Tensor workspace = empty(like, {1}, ScalarType::Double);
        cuda::cross_entropy_bwd(p, static_cast<double*>(view(workspace).data), stream);
      });
}

void add_column_sums(const AddColumnSums& p, const Tensor& like) {
  run_on_device_of(
      like, [&] { cpu::add_column_sums(p); },
      [&](void* stream) {
        const int64_t floats = cuda::add_column_sums_workspace(p.x.size[0], p.x.size[1]);
        const Tensor workspace = empty(like, {floats}, ScalarType::Float);
        cuda::add_column_sums(p, static_cast<float*>(view(workspace).data), stream);
      });
}

// What the gradients are multiplied by in the end, on a GPU; 1 where it is absent.
struct Factor {
  TensorRef numerator, divisor;
};

// to = factor sum; a CPU has no factor.
void round_to(const TensorRef& to, const TensorRef& sum, const Factor& factor, const Tensor& like) {
  if (has_no_elements(to)) return;
  run_on_device_of(
      like,
      [&] {
        Tensor rounded = tensor_at(to, like);
        torch::stable::copy_(rounded, tensor_at(sum, like));
      },
      [&](void* stream) {
        cuda::add_scaled({TensorRef{}, sum, to, factor.numerator, factor.divisor}, stream);
      });
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(
    Tensor dloss, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, Tensor lse,
    Tensor weight_sum, int64_t ignore_index, int64_t reduction, double label_smoothing,
    bool need_dx, bool need_dweight, bool need_dbias) {
  const int64_t r = x.size(0), c = x.size(1), v = weight.size(0);
  CrossEntropyOptions options{v, ignore_index, static_cast<Reduction>(reduction), label_smoothing};
  check_targets(target, r, options);
  require(on_device(x, weight) && on_device(x, bias) && on_device(x, target) &&
              on_device(x, dloss) && on_device(x, lse) && on_device(x, weight_sum),
          "x");
  TensorRef dlosses = view_dloss(dloss, r, options.reduction);
  const TensorRef lses = view_flat(lse, "lse", DType::f64, {r});
  const TensorRef total = view_flat(weight_sum, "weight_sum", DType::f32, {});
  const TensorRef targets = view(target);
  const Blocks blocks(x, weight, bias);
  const bool wide = x.scalar_type() == ScalarType::Float;
  const bool each = options.reduction == Reduction::none;

  const bool on_gpu = runs_cuda_kernels(x);
  std::optional<Tensor> narrow;  // dlogits as they are multiplied, if not the logits' own memory
  Factor factor;
  if (!wide && (on_gpu || (blocks.dtype() == DType::bf16 && cpu::multiplies_bf16()))) {
    narrow = blocks.empty_block(x, x.scalar_type());
    if (on_gpu && !each) {
      factor.numerator = dlosses;
      if (options.reduction == Reduction::mean) factor.divisor = total;
      dlosses = TensorRef{};
      options.reduction = Reduction::sum;
    }
  }

  Tensor dx = need_dx ? empty(x, {r, c}) : empty(x, {0});
  Tensor dx_sum = need_dx && !wide ? empty(x, {r, c}, ScalarType::Float) : dx;
  Tensor dweight = need_dweight ? empty(weight, {v, c}) : empty(weight, {0});
  Tensor dbias = empty(x, {need_dbias ? v : 0}, ScalarType::Float);
  torch::stable::zero_(dbias);
  if (r == 0) torch::stable::zero_(dweight);
  std::optional<Tensor> dweight_sum;
  if (need_dweight && !wide) dweight_sum = empty(weight, {blocks.classes(), c}, ScalarType::Float);

  blocks.over_classes([&](int64_t j, int64_t classes) {
    TensorRef dweight_block;
    if (need_dweight) {
      dweight_block = dweight_sum.has_value() ? rows_of(view(*dweight_sum), 0, classes)
                                              : rows_of(view(dweight), j, classes);
    }
    blocks.over_rows([&](int64_t i, int64_t count) {
      const TensorRef logits = blocks.logits(i, count, j, classes);
      const TensorRef dlogits =
          narrow.has_value() ? Blocks::part_of(*narrow, count, classes) : logits;
      // The sum over the rows, whose terms cancel, is that of floats.
      const TensorRef gradient = need_dbias ? logits : dlogits;
      turn_into_gradient(
          {each ? rows_of(dlosses, i, count) : dlosses, logits, rows_of(targets, i, count),
           TensorRef{}, rows_of(lses, i, count), total, gradient, j, options},
          x);
      if (need_dbias) {
        add_column_sums({gradient, rows_of(view(dbias), j, classes)}, x);
        if (narrow.has_value()) round_to(dlogits, gradient, Factor{}, x);
      }
      if (need_dx) {
        multiply({dlogits, blocks.weight(j, classes), TensorRef{}, rows_of(view(dx_sum), i, count),
                  j > 0},
                 x);
      }
      if (need_dweight) {
        multiply({transposed(dlogits), blocks.x(i, count), TensorRef{}, dweight_block, i > 0}, x);
      }
    });
    if (dweight_sum.has_value()) {
      round_to(rows_of(view(dweight), j, classes), dweight_block, factor, x);
    }
  });
  if (need_dx && !wide) round_to(view(dx), view(dx_sum), factor, x);
  const TensorRef row = repeated(view(dbias), 1);
  if (factor.numerator) round_to(row, row, factor, x);
  return {dx, dweight, dbias};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_cross_entropy_fwd", FASTGPT_BOX(linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", FASTGPT_BOX(linear_cross_entropy_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding

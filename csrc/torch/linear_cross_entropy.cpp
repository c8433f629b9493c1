// Blocks of classes outside, blocks of rows inside: float32 logits of one block at a time, which
// the cross-entropy kernels absorb, or turn into their gradient. The gradients of x and of weight
// are summed in float32 and rounded once. Scratch does not grow with the number of rows or classes:
// at most about 64 MiB on the CPU; on a GPU 64 MiB of logits, and backward 160 MiB more of factors,
// products and sums where c is 4096.
// fwd_bwd, of a CPU, takes the logits of as many rows at a time as the caller says, all their
// classes, and computes the gradients from them instead of computing the logits again.
//
// A GPU, and a CPU that multiplies bf16, take dlogits rounded to the dtype of x. dloss waits for
// the end where all rows share it, and so does their number on a GPU, where they then have the size
// of p, and not of p / r, which float16 could not hold.
//
// Flops: 2 r v c forward, 6 r v c backward; 6 r v c for both in fwd_bwd.
#include "csrc/ops/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

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

// The blocks of rows and classes, and their logits.
class Blocks {
 public:
  Blocks(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
         int64_t most_rows = std::numeric_limits<int64_t>::max())
      : x_(view_input(x, "x", 2)),
        weight_(view_rows(weight, "weight", x_.dtype, {weight.size(0), x_.size[1]})),
        sizes_(runs_cuda_kernels(x) ? kCudaBlocks : kCpuBlocks),
        rows_(std::max(std::min({sizes_.rows, x_.size[0], most_rows}), int64_t{1})),
        classes_(std::max(std::min(most_classes(sizes_, x_.size[1]), weight_.size[0]), int64_t{1})),
        like_(x) {
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

  // visit(first row, number of rows) likewise, of all rows or of those in [begin, end), where begin
  // is that of a block.
  template <typename Visit>
  void over_rows(const Visit& visit) const {
    over_rows(0, x_.size[0], visit);
  }
  template <typename Visit>
  void over_rows(int64_t begin, int64_t end, const Visit& visit) const {
    for (int64_t i = begin; i < end; i += rows_) visit(i, std::min(rows_, end - i));
  }

  TensorRef x(int64_t i, int64_t rows) const { return rows_of(x_, i, rows); }
  TensorRef weight(int64_t j, int64_t classes) const { return rows_of(weight_, j, classes); }
  int64_t classes() const { return classes_; }

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

  // out = x (rows, c) weight (classes, c)^T + bias.
  void logits(int64_t i, int64_t rows, int64_t j, int64_t classes, const TensorRef& out) const {
    const TensorRef bias = bias_.has_value() ? rows_of(view(*bias_), j, classes) : TensorRef{};
    multiply({x(i, rows), transposed(weight(j, classes)), bias, out, false}, like_);
  }

 private:
  static int64_t most_classes(const BlockSizes& sizes, int64_t c) {
    const int64_t most = std::min(sizes.elements / (c + 1) + 1, sizes.classes);
    return std::max(most / sizes.step, int64_t{1}) * sizes.step;
  }

  TensorRef x_, weight_;
  BlockSizes sizes_;
  int64_t rows_, classes_;
  Tensor like_;
  std::optional<Tensor> bias_;
};

void absorb(const CrossEntropyAbsorb& p, const Tensor& like) {
  run_on_device_of(
      like, [&] { cpu::cross_entropy_absorb(p); },
      [&](void* stream) { cuda::cross_entropy_absorb(p, stream); });
}

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
  const RowStates rows(x, x.size(0));
  const Tensor block = blocks.empty_block(x, ScalarType::Float);
  blocks.over_classes([&](int64_t j, int64_t classes) {
    blocks.over_rows([&](int64_t i, int64_t count) {
      const TensorRef logits = Blocks::part_of(block, count, classes);
      blocks.logits(i, count, j, classes, logits);
      absorb({logits, rows_of(targets, i, count), TensorRef{}, j, options, rows.states() + i}, x);
    });
  });
  const CrossEntropyResult result = rows.finish(x, targets, TensorRef{}, options);
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

// Whether products take dlogits in the narrow dtype of x.
bool multiplies_narrow(const Tensor& x) {
  bool narrow = false;
  run_on_device_of(
      x, [&] { narrow = x.scalar_type() == ScalarType::BFloat16 && cpu::multiplies_bf16(); },
      [&](void*) { narrow = true; });
  return narrow;
}

// What the gradients are multiplied by in the end; 1 where it is absent.
struct Factor {
  TensorRef numerator, divisor;
};

// to = factor sum.
void round_to(const TensorRef& to, const TensorRef& sum, const Factor& factor, const Tensor& like) {
  const bool same = to.data == sum.data && !factor.numerator && !factor.divisor;
  if (has_no_elements(to) || same) return;
  const AddScaled p{TensorRef{}, sum, to, factor.numerator, factor.divisor};
  run_on_device_of(
      like, [&] { cpu::add_scaled(p); }, [&](void* stream) { cuda::add_scaled(p, stream); });
}

struct Needs {
  bool dx, dweight, dbias;
};

// What the loss of a row is multiplied by.
struct LossGradient {
  TensorRef dlosses;  // (r), () or absent: 1
  TensorRef total;    // () f32: the divisor of Reduction::mean
};

// Whether narrow gradients are those of the dtypes of x and weight, or the float32 sums.
enum class Narrow { kRounded, kSums };

// The gradients of x, weight and bias, block by block.
class Gradients {
 public:
  Gradients(const Tensor& x, const Tensor& weight, const Tensor& target, const Blocks& blocks,
            const CrossEntropyOptions& options, const LossGradient& loss, const Needs& needs,
            Narrow narrow)
      : x_(x),
        blocks_(blocks),
        options_(options),
        loss_(loss),
        needs_(needs),
        targets_(view(target)),
        dtype_(narrow == Narrow::kSums ? ScalarType::Float : x.scalar_type()),
        dx_(empty_if(needs.dx, x, x.size(0), dtype_)),
        dx_sum_(dx_),
        dweight_(empty_if(needs.dweight, weight, weight.size(0), dtype_)),
        dbias_(empty(x, {needs.dbias ? weight.size(0) : 0}, ScalarType::Float)) {
    torch::stable::zero_(dbias_);
    if (x.size(0) == 0) torch::stable::zero_(dweight_);
    const bool on_gpu = runs_cuda_kernels(x), wide = x.scalar_type() == ScalarType::Float;
    // Not where it is no number, and would reach the zeros of ignored rows.
    const bool waits = on_gpu ? !wide : !loss.dlosses || std::isfinite(*host_float(loss.dlosses));
    if (options.reduction != Reduction::none && waits) {
      std::swap(factor_.numerator, loss_.dlosses);
      if (on_gpu && options.reduction == Reduction::mean) {
        factor_.divisor = loss.total;
        options_.reduction = Reduction::sum;
      }
    }
    if (dtype_ != ScalarType::Float) {
      dx_sum_ = empty_if(needs.dx, x, x.size(0), ScalarType::Float);
      if (needs.dweight) {
        dweight_sum_ = empty(weight, {blocks.classes(), x.size(1)}, ScalarType::Float);
      }
    }
    if (!wide && multiplies_narrow(x)) narrow_ = blocks.empty_block(x, x.scalar_type());
  }

  // Of one block, whose logits are lost, lses (count) those of its rows; i ascends for each j, and
  // j for each i.
  void add(int64_t i, int64_t count, int64_t j, int64_t classes, const TensorRef& logits,
           const TensorRef& lses) {
    const TensorRef dlogits =
        narrow_.has_value() ? Blocks::part_of(*narrow_, count, classes) : logits;
    // The sum over the rows, whose terms cancel, is that of floats.
    const TensorRef gradient = needs_.dbias ? logits : dlogits;
    const bool each = options_.reduction == Reduction::none;
    turn_into_gradient(
        {each ? rows_of(loss_.dlosses, i, count) : loss_.dlosses, logits,
         rows_of(targets_, i, count), TensorRef{}, lses, loss_.total, gradient, j, options_},
        x_);
    if (needs_.dbias) {
      add_column_sums({gradient, rows_of(view(dbias_), j, classes)}, x_);
      if (narrow_.has_value()) round_to(dlogits, gradient, Factor{}, x_);
    }
    if (needs_.dx) {
      multiply({dlogits, blocks_.weight(j, classes), TensorRef{}, rows_of(view(dx_sum_), i, count),
                j > 0},
               x_);
    }
    if (needs_.dweight) {
      multiply(
          {transposed(dlogits), blocks_.x(i, count), TensorRef{}, dweight_of(j, classes), i > 0},
          x_);
    }
  }

  // After all rows of a block of classes.
  void end_classes(int64_t j, int64_t classes) {
    if (!needs_.dweight) return;
    round_to(rows_of(view(dweight_), j, classes), dweight_of(j, classes), factor_, x_);
  }

  std::tuple<Tensor, Tensor, Tensor> end() {
    if (needs_.dx) round_to(view(dx_), view(dx_sum_), factor_, x_);
    const TensorRef row = repeated(view(dbias_), 1);
    round_to(row, row, factor_, x_);
    return {dx_, dweight_, dbias_};
  }

 private:
  static const float* host_float(const TensorRef& t) { return static_cast<const float*>(t.data); }

  static Tensor empty_if(bool needed, const Tensor& like, int64_t rows, ScalarType dtype) {
    return needed ? empty(like, {rows, like.size(1)}, dtype) : empty(like, {0}, dtype);
  }

  TensorRef dweight_of(int64_t j, int64_t classes) const {
    return dweight_sum_.has_value() ? rows_of(view(*dweight_sum_), 0, classes)
                                    : rows_of(view(dweight_), j, classes);
  }

  Tensor x_;
  const Blocks& blocks_;
  CrossEntropyOptions options_;
  LossGradient loss_;
  Needs needs_;
  TensorRef targets_;
  ScalarType dtype_;  // of dx and dweight
  Tensor dx_, dx_sum_, dweight_, dbias_;
  std::optional<Tensor> dweight_sum_;  // of one block of classes, where dweight is narrow
  std::optional<Tensor> narrow_;  // dlogits as they are multiplied, if not the logits' own memory
  Factor factor_;
};

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(
    Tensor dloss, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, Tensor lse,
    Tensor weight_sum, int64_t ignore_index, int64_t reduction, double label_smoothing,
    bool need_dx, bool need_dweight, bool need_dbias) {
  const int64_t r = x.size(0);
  const CrossEntropyOptions options{weight.size(0), ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, r, options);
  require(on_device(x, weight) && on_device(x, bias) && on_device(x, target) &&
              on_device(x, dloss) && on_device(x, lse) && on_device(x, weight_sum),
          "x");
  const LossGradient loss{view_dloss(dloss, r, options.reduction),
                          view_flat(weight_sum, "weight_sum", DType::f32, {})};
  const TensorRef lses = view_flat(lse, "lse", DType::f64, {r});
  const Blocks blocks(x, weight, bias);
  const Tensor block = blocks.empty_block(x, ScalarType::Float);
  Gradients gradients(x, weight, target, blocks, options, loss, {need_dx, need_dweight, need_dbias},
                      Narrow::kRounded);
  blocks.over_classes([&](int64_t j, int64_t classes) {
    blocks.over_rows([&](int64_t i, int64_t count) {
      const TensorRef logits = Blocks::part_of(block, count, classes);
      blocks.logits(i, count, j, classes, logits);
      gradients.add(i, count, j, classes, logits, rows_of(lses, i, count));
    });
    gradients.end_classes(j, classes);
  });
  return gradients.end();
}

// The loss and its gradients for dloss = 1, in float32, from the logits of `kept` rows at a time.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd_bwd(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor target, int64_t ignore_index,
    int64_t reduction, double label_smoothing, int64_t kept, bool need_dx, bool need_dweight,
    bool need_dbias) {
  const int64_t r = x.size(0), v = weight.size(0);
  const CrossEntropyOptions options{v, ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, r, options);
  require(x.is_cpu() && !runs_cuda_kernels(x) && on_device(x, weight) && on_device(x, bias) &&
              on_device(x, target) && r > 0,
          "x");
  require(options.reduction != Reduction::none, "reduction");
  require(kept > 0, "rows_kept");
  const Blocks blocks(x, weight, bias, kept);
  const TensorRef targets = view(target);
  const Tensor total = empty(x, {}, ScalarType::Float);
  const RowStates rows(x, r);
  const int64_t* classes_of = static_cast<const int64_t*>(targets.data);
  *static_cast<float*>(view(total).data) = static_cast<float>(
      std::count_if(classes_of, classes_of + r, [&](int64_t t) { return t != ignore_index; }));
  Gradients gradients(x, weight, target, blocks, options, {TensorRef{}, view(total)},
                      {need_dx, need_dweight, need_dbias}, Narrow::kSums);

  constexpr int64_t kPadding = 16;  // keeps rows off the same sets of the cache; Python counts it
  const Tensor logits = empty(x, {std::min(kept, r), v + kPadding}, ScalarType::Float);
  for (int64_t begin = 0; begin < r; begin += kept) {
    const int64_t end = std::min(begin + kept, r);
    const auto block = [&](int64_t i, int64_t count, int64_t j, int64_t classes) {
      TensorRef part = rows_of(Blocks::part_of(logits, end - begin, classes), i - begin, count);
      part.data = static_cast<float*>(part.data) + j;
      return part;
    };
    blocks.over_classes([&](int64_t j, int64_t classes) {
      blocks.over_rows(begin, end, [&](int64_t i, int64_t count) {
        const TensorRef part = block(i, count, j, classes);
        blocks.logits(i, count, j, classes, part);
        absorb({part, rows_of(targets, i, count), TensorRef{}, j, options, rows.states() + i}, x);
      });
    });
    const CrossEntropyResult lot =
        rows.finish(x, rows_of(targets, begin, end - begin), TensorRef{}, options, begin);
    blocks.over_classes([&](int64_t j, int64_t classes) {
      blocks.over_rows(begin, end, [&](int64_t i, int64_t count) {
        gradients.add(i, count, j, classes, block(i, count, j, classes),
                      rows_of(view(lot.lse), i - begin, count));
      });
    });
  }
  const CrossEntropyResult result = rows.finish(x, targets, TensorRef{}, options);
  const auto [dx, dweight, dbias] = gradients.end();
  return {result.loss, result.lse, result.weight_sum, dx, dweight, dbias};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_cross_entropy_fwd", FASTGPT_BOX(linear_cross_entropy_fwd));
  m.impl("linear_cross_entropy_bwd", FASTGPT_BOX(linear_cross_entropy_bwd));
  m.impl("linear_cross_entropy_fwd_bwd", FASTGPT_BOX(linear_cross_entropy_fwd_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding

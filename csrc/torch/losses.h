// What the bindings of the two cross-entropy losses share.
#pragma once

#include "csrc/ops/cross_entropy.h"
#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {

// Every target is a class or ignore_index, or Python raises a ValueError that says which is not. On
// a GPU the kernels look.
inline void check_targets(const Tensor& target, int64_t r, const CrossEntropyOptions& o) {
  const TensorRef checked = view_flat(target, "target", DType::i64, {r});
  if (!target.is_cpu()) return;
  const int64_t* classes = static_cast<const int64_t*>(checked.data);
  for (int64_t i = 0; i < r; ++i) {
    if ((classes[i] >= 0 && classes[i] < o.classes) || classes[i] == o.ignore_index) continue;
    STD_TORCH_CHECK(false, "fastgpt.ValueError: target[", i, "]: expected a class from 0 to ",
                    o.classes - 1, " or ignore_index ", o.ignore_index, ", got ", classes[i]);
  }
}

inline TensorRef view_dloss(const Tensor& dloss, int64_t r, Reduction reduction) {
  if (reduction == Reduction::none) return view_flat(dloss, "dloss", DType::f32, {r});
  return view_flat(dloss, "dloss", DType::f32, {});
}

struct CrossEntropyResult {
  Tensor loss, lse, weight_sum;
};

// Memory for the states of rows, where the kernels work, and for their losses: one allocation.
class RowStates {
 public:
  RowStates(const Tensor& like, int64_t r)
      : memory_(empty(like, {r * kBytes}, ScalarType::Byte)),
        states_(static_cast<CrossEntropyRow*>(view(memory_).data)),
        losses_(reinterpret_cast<float*>(states_ + r)) {}

  CrossEntropyRow* states() const { return states_; }

  // The result of all rows, or of those of `target` from `begin`, that have absorbed all their
  // classes. like: on the device of all.
  CrossEntropyResult finish(const Tensor& like, const TensorRef& target, const TensorRef& weight,
                            const CrossEntropyOptions& o, int64_t begin = 0) const {
    const int64_t r = target.size[0];
    const bool separate = o.reduction == Reduction::none;
    Tensor loss =
        separate ? empty(like, {r}, ScalarType::Float) : empty(like, {}, ScalarType::Float);
    Tensor lse = empty(like, {r}, ScalarType::Double);
    Tensor weight_sum = empty(like, {}, ScalarType::Float);
    TensorRef row_loss;
    row_loss.data = separate ? view(loss).data : losses_ + begin;
    row_loss.ndim = 1;
    row_loss.size[0] = r;
    row_loss.stride[0] = 1;
    const CrossEntropyFinish p{states_ + begin, target,     weight,    o,
                               row_loss,        view(loss), view(lse), view(weight_sum)};
    run_on_device_of(
        like, [&] { cpu::cross_entropy_finish(p); },
        [&](void* stream) { cuda::cross_entropy_finish(p, stream); });
    return {loss, lse, weight_sum};
  }

 private:
  static constexpr int64_t kBytes = sizeof(CrossEntropyRow) + sizeof(float);

  Tensor memory_;
  CrossEntropyRow* states_;
  float* losses_;
};

}  // namespace fastgpt::binding

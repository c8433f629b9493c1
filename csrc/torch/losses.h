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

// Memory for the states of r rows, where the kernels work.
inline Tensor empty_rows(const Tensor& like, int64_t r) {
  static_assert(sizeof(CrossEntropyRow) % sizeof(double) == 0);
  constexpr int64_t kDoubles = sizeof(CrossEntropyRow) / sizeof(double);
  return empty(like, {r * kDoubles}, ScalarType::Double);
}

inline CrossEntropyRow* row_states(const Tensor& rows) {
  return static_cast<CrossEntropyRow*>(view(rows).data);
}

// The result of rows that have absorbed all their classes. like: on the device of all.
inline CrossEntropyResult finish_rows(const Tensor& like, const TensorRef& target,
                                      const TensorRef& weight, const CrossEntropyOptions& o,
                                      const CrossEntropyRow* rows) {
  const int64_t r = target.size[0];
  Tensor row_loss = empty(like, {r}, ScalarType::Float);
  Tensor loss = empty(like, {}, ScalarType::Float);
  Tensor lse = empty(like, {r}, ScalarType::Double);
  Tensor weight_sum = empty(like, {}, ScalarType::Float);
  const CrossEntropyFinish p{rows,           target,     weight,    o,
                             view(row_loss), view(loss), view(lse), view(weight_sum)};
  run_on_device_of(
      like, [&] { cpu::cross_entropy_finish(p); },
      [&](void* stream) { cuda::cross_entropy_finish(p, stream); });
  return {o.reduction == Reduction::none ? row_loss : loss, lse, weight_sum};
}

inline CrossEntropyResult finish(const Tensor& target, const TensorRef& weight,
                                 const CrossEntropyOptions& o, const Tensor& rows) {
  return finish_rows(target, view(target), weight, o, row_states(rows));
}

}  // namespace fastgpt::binding

// Matrix products by torch's own mm: on a GPU by cuBLAS, on the stream that torch has current.
#pragma once

#include <array>

#include "csrc/torch/common.h"

namespace fastgpt::binding {

// The memory of t as a tensor on like's device; t must outlive it.
inline Tensor tensor_at(const TensorRef& t, const Tensor& like) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                   ScalarType::Byte,  ScalarType::Int,      ScalarType::Long,
                                   ScalarType::Double};  // in the order of DType
  return torch::stable::from_blob(t.data, {t.size, static_cast<size_t>(t.ndim)},
                                  {t.stride, static_cast<size_t>(t.ndim)}, like.device(),
                                  kTypes[static_cast<int>(t.dtype)]);
}

// c (m, n) f32 = a (m, k) b (k, n). The products of 16-bit factors are exact, sums are float.
inline void library_product(const TensorRef& a, const TensorRef& b, const TensorRef& c,
                            const Tensor& like) {
  using torch::stable::detail::from;
  Tensor out = tensor_at(c, like);
  if (a.size[1] == 0) {
    torch::stable::zero_(out);
    return;
  }
  Tensor left = tensor_at(a, like), right = tensor_at(b, like);
  const bool narrow = a.dtype != DType::f32;
  StableIValue result{};
  if (narrow && !like.is_cpu()) {
    std::array<StableIValue, 4> stack{from(left), from(right), from(ScalarType::Float), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    result = stack[0];
  } else {
    if (narrow) {  // torch's mm of the CPU rounds to the dtype of its factors
      left = torch::stable::to(left, ScalarType::Float);
      right = torch::stable::to(right, ScalarType::Float);
    }
    std::array<StableIValue, 3> stack{from(left), from(right), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    result = stack[0];
  }
  torch::stable::detail::to<Tensor>(result);  // another reference to out, which ends here
}

}  // namespace fastgpt::binding

// What the op bindings share: tensors in, params out, errors raised. Stable ABI only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "csrc/ops/tensor_ref.h"

namespace fastgpt::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return DType::u8;
    case ScalarType::Int:
      return DType::i32;
    case ScalarType::Long:
      return DType::i64;
    default:
      STD_TORCH_CHECK(false, "fastgpt: no kernel takes this dtype");
  }
}

inline TensorRef view(const Tensor& t) {
  TensorRef r;
  r.ndim = static_cast<int>(t.dim());
  STD_TORCH_CHECK(r.ndim <= TensorRef::kMaxDims, "fastgpt: too many dimensions: ", r.ndim);
  static const int64_t empty = 0;
  r.data = t.numel() == 0 ? const_cast<int64_t*>(&empty) : t.data_ptr();
  r.dtype = dtype_of(t);
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  for (int i = 0; i < r.ndim; ++i) {
    r.size[i] = sizes[i];
    r.stride[i] = strides[i];
  }
  return r;
}

inline TensorRef view(const std::optional<Tensor>& t) {
  return t.has_value() ? view(*t) : TensorRef{};
}

// An output that was not asked for: size 0, absent to the kernel.
inline TensorRef view_unless_empty(const Tensor& t) {
  return t.numel() == 0 ? TensorRef{} : view(t);
}

// A new contiguous tensor on like's device. By the shim: torch::stable::new_empty looks the
// operator up by its name on every call, which costs as much again as the allocation.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.begin(),
                                                          static_cast<int64_t>(size.size()), &code,
                                                          nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
  return empty(like, size, like.scalar_type());
}

// A kernel found bad contents: Python turns this message into a ValueError.
inline void check_contents(const ContentError& e) {
  if (e.argument == nullptr) return;
  STD_TORCH_CHECK(false, "fastgpt.ValueError: ", e.argument, "[", e.index, "]: expected ",
                  e.expected, ", got ", e.value);
}

}  // namespace fastgpt::binding

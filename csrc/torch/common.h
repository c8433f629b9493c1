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

#include "csrc/cpu/pages.h"
#include "csrc/ops/tensor_ref.h"
#if defined(FASTGPT_EMULATED)
#include "tests/emulator/emulator.h"
#endif

// Of torch 2.11 and later; null in an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* size, const int64_t* stride, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fastgpt::binding {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
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
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "fastgpt: no kernel takes this dtype");
  }
}

// What a kernel relies on to stay in bounds. Python has checked it, with messages that say more; a
// raw call of torch.ops.fastgpt has not.
inline void require(bool holds, const char* argument) {
  STD_TORCH_CHECK(holds, "fastgpt: ", argument,
                  ": unexpected shape, strides, dtype or device in a raw call");
}

// `t` with `rank` dimensions: of a contiguous tensor with more, the leading ones as one.
inline TensorRef view_stack(const Tensor& t, const char* argument, int rank) {
  STD_TORCH_CHECK(rank <= TensorRef::kMaxDims, "fastgpt: too many dimensions: ", rank);
  const int folded = static_cast<int>(t.dim()) - rank;
  require(folded == 0 || (folded > 0 && t.is_contiguous()), argument);
  static const int64_t empty = 0;
  TensorRef r;
  r.data = t.numel() == 0 ? const_cast<int64_t*>(&empty) : t.data_ptr();
  r.dtype = dtype_of(t);
  r.ndim = rank;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t step = 1;
  for (int i = rank - 1; i >= 0; --i) {
    r.size[i] = sizes[folded + i];
    r.stride[i] = folded == 0 ? strides[i] : step;  // torch's may be any where the size is 1
    step *= r.size[i];
  }
  for (int i = 0; i < folded; ++i) r.size[0] *= sizes[i];
#if defined(FASTGPT_EMULATED)
  emulator::allow(r);  // kernels that touch other memory are reported
#endif
  return r;
}

inline TensorRef view(const Tensor& t) {
  return view_stack(t, "", static_cast<int>(t.dim()));
}

inline TensorRef view(const std::optional<Tensor>& t) {
  return t.has_value() ? view(*t) : TensorRef{};
}

// With a CUDA kernel beside the CPU's, raw calls may mix devices: the dispatcher takes the higher.
inline bool on_device(const Tensor& x, const Tensor& t) {
  if (x.is_cpu() || t.is_cpu()) return x.is_cpu() && t.is_cpu();
  return t.get_device_index() == x.get_device_index();
}

inline bool on_device(const Tensor& x, const std::optional<Tensor>& t) {
  return !t.has_value() || on_device(x, *t);
}

inline bool is_float(const TensorRef& t) {
  return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16;
}

inline bool has_size(const TensorRef& t, std::initializer_list<int64_t> size) {
  bool same = t.ndim == static_cast<int>(size.size());
  for (int i = 0; same && i < t.ndim; ++i) same = t.size[i] == size.begin()[i];
  return same;
}

inline bool has_no_elements(const TensorRef& t) {
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] == 0) return true;
  }
  return false;
}

inline bool has_unit_stride(const TensorRef& t) {
  if (t.ndim == 0 || t.size[t.ndim - 1] <= 1 || t.stride[t.ndim - 1] == 1) return true;
  return has_no_elements(t);
}

inline bool is_contiguous(const TensorRef& t) {
  int64_t elements = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.size[i] > 1 && t.stride[i] != elements) return has_no_elements(t);
    elements *= t.size[i];
  }
  return true;
}

// A float tensor of `ndim` dimensions, the first of an op's.
inline TensorRef view_input(const Tensor& t, const char* argument, int ndim) {
  const TensorRef r = view(t);
  require(is_float(r) && r.ndim == ndim && has_unit_stride(r), argument);
  return r;
}

// The same of an op on rows (r, n) or matrices (r, m, n), which may be stacked in any way.
inline TensorRef view_input_stack(const Tensor& t, const char* argument, int rank) {
  const TensorRef r = view_stack(t, argument, rank);
  require(is_float(r) && has_unit_stride(r), argument);
  return r;
}

// A tensor of this dtype and, once stacked as `like`, of its size.
inline TensorRef view_stack(const Tensor& t, const char* argument, DType dtype,
                            const TensorRef& like) {
  const TensorRef r = view_stack(t, argument, like.ndim);
  bool same = r.dtype == dtype && has_unit_stride(r);
  for (int i = 0; i < r.ndim; ++i) same = same && r.size[i] == like.size[i];
  require(same, argument);
  return r;
}

inline TensorRef view_stack(const std::optional<Tensor>& t, const char* argument, DType dtype,
                            const TensorRef& like) {
  return t.has_value() ? view_stack(*t, argument, dtype, like) : TensorRef{};
}

// A tensor of this dtype and size whose last stride is 1.
inline TensorRef view_rows(const Tensor& t, const char* argument, DType dtype,
                           std::initializer_list<int64_t> size) {
  const TensorRef r = view(t);
  require(r.dtype == dtype && has_size(r, size) && has_unit_stride(r), argument);
  return r;
}

inline TensorRef view_rows(const std::optional<Tensor>& t, const char* argument, DType dtype,
                           std::initializer_list<int64_t> size) {
  return t.has_value() ? view_rows(*t, argument, dtype, size) : TensorRef{};
}

// A contiguous tensor of this dtype and size.
inline TensorRef view_flat(const Tensor& t, const char* argument, DType dtype,
                           std::initializer_list<int64_t> size) {
  const TensorRef r = view(t);
  require(r.dtype == dtype && has_size(r, size) && is_contiguous(r), argument);
  return r;
}

inline TensorRef view_flat(const std::optional<Tensor>& t, const char* argument, DType dtype,
                           std::initializer_list<int64_t> size) {
  return t.has_value() ? view_flat(*t, argument, dtype, size) : TensorRef{};
}

// A parameter vector (n) of any float dtype, or none.
inline TensorRef view_parameter(const std::optional<Tensor>& t, const char* argument, int64_t n) {
  const TensorRef r = view(t);
  require(!r || (is_float(r) && has_size(r, {n}) && has_unit_stride(r)), argument);
  return r;
}

// The dtype of a result: that of the input, or float32 where the caller asks for it.
inline ScalarType result_dtype(const Tensor& input, bool float_out) {
  return float_out ? ScalarType::Float : input.scalar_type();
}

// An output that was not asked for: size 0, absent to the kernel.
inline TensorRef view_unless_empty(const Tensor& t) {
  return t.numel() == 0 ? TensorRef{} : view(t);
}

// A new tensor on like's device. By the shim, which allocates on the CPU without a pass through the
// dispatcher: a third of what new_empty costs.
inline Tensor empty_strided(const Tensor& like, Sizes size, const int64_t* stride,
                            ScalarType dtype) {
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto ndim = static_cast<int64_t>(size.size());
  AtenTensorHandle handle = nullptr;
  if (device == aoti_torch_device_type_cpu() && torch_from_blob != nullptr) {
    int64_t elements = 1;
    for (const int64_t n : size) elements *= n;
    if (Pages* pages = take_pages(elements * aoti_torch_dtype_element_size(code))) {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
          pages->data, ndim, size.data(), stride, 0, code, device, index, &handle,
          aoti_torch_layout_strided(), nullptr, 0,
          [](void*, void* pages) { keep_pages(static_cast<Pages*>(pages)); }, pages));
      return Tensor(handle);
    }
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, size.data(), stride, code, device, index, &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor empty(const Tensor& like, Sizes size, ScalarType dtype) {
  constexpr size_t kMostDims = 64;  // torch's own limit
  int64_t stride[kMostDims] = {};
  STD_TORCH_CHECK(size.size() <= kMostDims, "fastgpt: too many dimensions: ", size.size());
  int64_t step = 1;
  for (size_t i = size.size(); i-- > 0;) {
    stride[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
  return empty_strided(like, size, stride, dtype);
}

inline Tensor empty(const Tensor& like, Sizes size) {
  return empty(like, size, like.scalar_type());
}

// A kernel found bad contents: Python turns this message into a ValueError.
inline void check_contents(const ContentError& e) {
  if (e.argument == nullptr) return;
  STD_TORCH_CHECK(false, "fastgpt.ValueError: ", e.argument, "[", e.index, "]: expected ",
                  e.expected, ", got ", e.value);
}

}  // namespace fastgpt::binding

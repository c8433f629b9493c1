// What the kernels see of a tensor. No torch, no CUDA: raw pointers, sizes and strides in elements.
#pragma once

#include <cstdint>

namespace fastgpt {

enum class DType : int8_t { f32, bf16, f16, u8, i32, i64, f64 };

struct TensorRef {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;  // nullptr: the optional tensor is absent
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  explicit operator bool() const { return data != nullptr; }
};

// What a CPU kernel found wrong with the contents of a tensor (a target out of range, decreasing
// offsets). Kernels never throw inside a parallel region: they fill this, the caller raises.
struct ContentError {
  const char* argument = nullptr;  // nullptr: nothing is wrong
  const char* expected = nullptr;
  int64_t index = 0;
  int64_t value = 0;
};

}  // namespace fastgpt

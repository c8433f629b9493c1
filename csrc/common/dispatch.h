// A run-time value becomes a compile-time constant: the caller's generic lambda is instantiated
// once per value and called with the one that holds.
#pragma once

#include "csrc/ops/tensor_ref.h"

#ifndef FASTGPT_ISA
#define FASTGPT_ISA device
#endif

namespace fastgpt {
inline namespace FASTGPT_ISA {

template <typename T>
struct Type {
  using type = T;
};

template <auto value>
struct Constant {
  static constexpr auto kValue = value;
};

// Calls f(Type<T>{}) with T the storage type of dtype, one of float, Bf16 and F16.
template <typename Bf16, typename F16, typename F>
void visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16:
      return f(Type<Bf16>{});
    case DType::f16:
      return f(Type<F16>{});
    default:
      return f(Type<float>{});
  }
}

// Calls f(Constant<true>{}) or f(Constant<false>{}).
template <typename F>
void visit_bool(bool value, const F& f) {
  value ? f(Constant<true>{}) : f(Constant<false>{});
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

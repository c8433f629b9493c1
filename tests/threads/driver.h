// fastgpt_cpu_driver: every CPU entry point of csrc/ops without torch and without Python, on
// threads of its own, so that a sanitizer sees the kernels and nothing else. A case makes its
// inputs from a fixed sequence and names its results, which must have the same bits on one thread
// and on several.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ops/tensor_ref.h"

namespace fastgpt::driver {

using Shape = std::vector<int64_t>;

// The view with two axes exchanged.
inline TensorRef exchanged(TensorRef t, int a, int b) {
  std::swap(t.size[a], t.size[b]);
  std::swap(t.stride[a], t.stride[b]);
  return t;
}

struct Result {
  std::string name;
  DType dtype;
  Shape shape;
  const unsigned char* data;
};

// One run of a case. Owns its tensors, which are contiguous and end with their last element, so
// that the address sanitizer sees a step past it.
class Run {
 public:
  // Results are filled with `unwritten`, another byte in every run: an element that no thread
  // writes cannot have the same bits.
  Run(DType dtype, unsigned char unwritten) : dtype_(dtype), unwritten_(unwritten) {}

  DType dtype() const { return dtype_; }
  const std::vector<Result>& results() const { return results_; }

  // Values between -2 and 2 with every bit of the mantissa in use: sums of short ones are exact,
  // and exact sums have the same bits in any order.
  TensorRef input(const Shape& shape, DType dtype);
  TensorRef input(const Shape& shape) { return input(shape, dtype_); }
  TensorRef mask(const Shape& shape);  // u8, one in five is 0
  TensorRef integers(DType dtype, const Shape& values);

  TensorRef result(const char* name, const Shape& shape, DType dtype);
  TensorRef result(const char* name, const Shape& shape) { return result(name, shape, dtype_); }
  TensorRef updated(const char* name, const Shape& shape, DType dtype);  // an input and a result

  // Throws what a kernel found wrong with its inputs.
  void accept(const ContentError& error) const;

 private:
  TensorRef allocate(DType dtype, const Shape& shape);
  uint64_t random();

  DType dtype_;
  unsigned char unwritten_;
  uint64_t state_ = 0;
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
  std::vector<Result> results_;
};

struct Case {
  std::string name;
  std::function<void(Run&)> run;
};

std::vector<Case> attention_cases();
std::vector<Case> row_cases();
std::vector<Case> memory_cases();

// The threads of run_parallel, and on how many of them work has run since they were set.
void set_threads(int threads);
int threads_used();

}  // namespace fastgpt::driver

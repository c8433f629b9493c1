// Cases of device code that run in the emulator and, compiled by nvcc, on the GPU.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cuda/launch.cuh"

namespace fastgpt::cases {

struct Case {
  std::string name;
  std::function<void()> run;  // throws what is wrong
};

inline std::vector<Case>& all_cases() {
  static std::vector<Case> cases;
  return cases;
}

struct Register {
  Register(const char* name, std::function<void()> run) { all_cases().push_back({name, run}); }
};

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// So many values, which host and kernels see.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
#if defined(FASTGPT_EMULATED)
    data_ = static_cast<T*>(std::aligned_alloc(256, (count * sizeof(T) + 255) / 256 * 256));
    emulator::allow(data_, count * sizeof(T));
#else
    cuda::check(cudaMallocManaged(&data_, count * sizeof(T)), "memory of a test");
#endif
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(FASTGPT_EMULATED)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t count() const { return count_; }

 private:
  T* data_;
  size_t count_;
};

// One block, until it is done.
template <typename... Params, typename... Args>
void run_block(void (*kernel)(Params...), unsigned threads, size_t shared_bytes, Args... args) {
  cuda::launch(kernel, dim3(1), dim3(threads), shared_bytes, nullptr, args...);
#if !defined(FASTGPT_EMULATED)
  cuda::check(cudaDeviceSynchronize(), "a test");
#endif
}

template <typename T>
void require_equal(const char* what, size_t i, T got, T wanted) {
  if (got == wanted) return;
  throw std::runtime_error(std::string(what) + "[" + std::to_string(i) + "]: expected " +
                           std::to_string(wanted) + ", got " + std::to_string(got));
}

}  // namespace fastgpt::cases

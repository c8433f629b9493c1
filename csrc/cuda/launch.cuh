// The only place that launches a kernel, and where every CUDA error becomes an exception.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("fastgpt: ") + what + ": " + cudaGetErrorString(status));
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  constexpr size_t kDefaultShared = 48 * 1024;
  if (shared_bytes > kDefaultShared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Params(args)...);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace fastgpt::cuda

// The only place that launches a kernel, and where every CUDA error becomes an exception.
#pragma once

#if !defined(FASTGPT_EMULATED)
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "csrc/cuda/arch.h"

namespace fastgpt::cuda {

static inline void check_at_most(int64_t value, int64_t most, const char* what) {
  if (value <= most) return;
  throw std::runtime_error(std::string("fastgpt: ") + what + ": expected at most " +
                           std::to_string(most) + ", got " + std::to_string(value));
}

// The first dimension of a grid of so many blocks.
static inline unsigned grid_size(int64_t blocks) {
  check_at_most(blocks, 0x7fffffff, "blocks of a grid");
  return static_cast<unsigned>(blocks);
}

#if defined(FASTGPT_EMULATED)
using emulator::compute_capability;
using emulator::launch;
using emulator::most_shared_bytes;
#else
static inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("fastgpt: ") + what + ": " + cudaGetErrorString(status));
}

// Of the current device, 10 major + minor. Asked of each device once.
static inline int compute_capability() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  if (device < kDevices && known[device] != 0) return known[device];
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "a device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "a device");
  const int capability = 10 * major + minor;
  if (device < kDevices) known[device] = capability;
  return capability;
}

// What a block may have of shared memory on the current device, when launch() has opted in.
static inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "the current device");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "a device");
  return static_cast<size_t>(bytes);
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  kernel<<<grid, block, shared_bytes, on>>>(Params(args)...);
  check(cudaGetLastError(), "kernel launch");
}
#endif

}  // namespace fastgpt::cuda

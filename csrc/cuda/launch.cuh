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
using emulator::block_shared_bytes;
using emulator::compute_capability;
using emulator::launch;
using emulator::multiprocessors;
#else
constexpr int kKnownDevices = 64;  // of which what does not change is asked once

static inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next launch would report it
  throw std::runtime_error(std::string("fastgpt: ") + what + ": " + cudaGetErrorString(status));
}

static inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  return device;
}

static inline int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "a device");
  return value;
}

// What ask(device) says of the current device, as `known` has it after the first time; never 0.
template <typename Ask>
int known_of_device(std::atomic<int> (&known)[kKnownDevices], const Ask& ask) {
  const int device = current_device();
  if (device >= kKnownDevices) return ask(device);
  if (known[device] == 0) known[device] = ask(device);
  return known[device];
}

// Of the current device, 10 major + minor.
static inline int compute_capability() {
  static std::atomic<int> known[kKnownDevices];
  return known_of_device(known, [](int device) {
    return 10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) +
           attribute_of(device, cudaDevAttrComputeCapabilityMinor);
  });
}

// Of the current device.
static inline int multiprocessors() {
  static std::atomic<int> known[kKnownDevices];
  return known_of_device(
      known, [](int device) { return attribute_of(device, cudaDevAttrMultiProcessorCount); });
}

// What a block may have of shared memory on the current device, static and dynamic.
static inline size_t block_shared_bytes() {
  static std::atomic<int> known[kKnownDevices];
  return static_cast<size_t>(known_of_device(known, [](int device) {
    return attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }));
}
#endif

// What a launch may ask for.
static inline size_t most_shared_bytes() {
  return block_shared_bytes() - kStaticSharedBytes;
}

#if !defined(FASTGPT_EMULATED)
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  if (shared_bytes > kDefaultSharedBytes - kStaticSharedBytes) {
    const size_t most = most_shared_bytes();
    check_at_most(static_cast<int64_t>(shared_bytes), static_cast<int64_t>(most),
                  "bytes of shared memory that this GPU gives a block");
    // Always the same limit: another thread may be about to launch this kernel with more.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most)),
          "shared memory of a kernel");
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  kernel<<<grid, block, shared_bytes, on>>>(Params(args)...);
  check(cudaGetLastError(), "kernel launch");
}
#endif

}  // namespace fastgpt::cuda

#include "csrc/cuda/arch.h"

#include <mutex>
#include <vector>

#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

const Arch& current_arch() {
  static std::mutex mutex;
  static std::vector<Arch*> arches;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device) >= arches.size()) arches.resize(device + 1, nullptr);
  if (arches[device] == nullptr) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
      return value;
    };
    arches[device] = new Arch{attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
                                  attribute(cudaDevAttrComputeCapabilityMinor),
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                              attribute(cudaDevAttrMultiProcessorCount)};
  }
  return *arches[device];
}

}  // namespace fastgpt::cuda

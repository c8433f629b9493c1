// Limits of the GPU architectures that the kernels are tuned for, as data.
#pragma once

namespace fastgpt::cuda {

constexpr int kWarp = 32;
constexpr int kMaxBlockThreads = 1024;

struct Arch {
  int capability;        // 10 * major + minor
  int shared_per_block;  // bytes that one block may have when it opts in
  int multiprocessors;
};

// The architecture of the current device; asked once per device.
const Arch& current_arch();

}  // namespace fastgpt::cuda

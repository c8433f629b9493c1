// What the CUDA kernels take for granted of every architecture that they are compiled for (sm_80
// and newer). Limits that differ between architectures stand here as data when a kernel needs one.
#pragma once

namespace fastgpt::cuda {

constexpr int kWarp = 32;
constexpr int kMaxBlockThreads = 1024;
constexpr unsigned kDefaultSharedBytes = 48 * 1024;  // what a block may have without opting in

}  // namespace fastgpt::cuda

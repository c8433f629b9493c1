// What the CUDA kernels take for granted of every architecture that they are compiled for (sm_80
// and newer), and the one place that knows of the emulator: tests/emulator runs these very sources
// on the CPU. Limits that differ between architectures stand here as data when a kernel needs one.
#pragma once

#if defined(FASTGPT_EMULATED)
#include "tests/emulator/device.h"
#else
// Shared memory by these macros only: for a CPU compiler __shared__ means nothing.
#define FASTGPT_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define FASTGPT_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace fastgpt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxBlockThreads = 1024;
constexpr unsigned kDefaultSharedBytes = 48 * 1024;  // what a block may have without opting in
// The most that a kernel with dynamic shared memory declares besides; the dynamic begins after it.
constexpr unsigned kStaticSharedBytes = 1024;

}  // namespace fastgpt::cuda

// The emulator: CUDA kernels on the CPU, one fiber a thread, one block after another.
//
// Modelled: barriers, shuffles, votes, cp.async, ldmatrix, mma, wgmma, shared memory. What the
// hardware leaves open is made to hurt: memory begins as NaN, a copy arrives only when it is waited
// for, a wgmma is computed only then, each launch has another order of threads. Reported: races on
// shared memory, accesses out of bounds or misaligned, collectives that not all threads reach, and
// what wgmma reads that no fence_shared() made visible to it. Every report is an exception of the
// launch. Not modelled: races through global memory; blocks that run at once; instructions of a
// warp in step (bank conflicts of plain accesses are not counted); the hardware's order of
// summation within an mma, and its approximations other than flushing to zero; changes to the
// registers that a wgmma reads as a; limits of registers and of time.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <tuple>

#include "csrc/ops/tensor_ref.h"

namespace fastgpt::emulator {

// ---- for the host ----

// Runs the grid; throws std::runtime_error with the report if a thread does what it must not.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(void*), void* arguments,
              size_t argument_bytes);

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  static_cast<void>(stream);
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, std::tuple<Params...>(Params(args)...)};
  const auto run = [](void* data) {
    Call& c = *static_cast<Call*>(data);
    std::apply(c.kernel, c.arguments);
  };
  run_grid(grid, block, shared_bytes, run, &call, sizeof call);
}

// The global memory of the calling thread's launches: they may touch nothing else. From the first
// to the last element of a tensor.
void allow(const TensorRef& t);
void allow(const void* data, size_t bytes);
// What was allowed before it or while it lives is forgotten when it dies.
struct Memory {
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();
};

// Of the device that is emulated, 80 to begin with: which kernels the host chooses, and whether
// they may use wgmma, which 90 has.
int compute_capability();
void set_compute_capability(int capability);
inline size_t block_shared_bytes() {
  return (compute_capability() == 80 ? 163 : 227) * 1024;
}

// So few that the small tensors of the tests fill them, as large ones fill a GPU.
constexpr int multiprocessors() {
  return 2;
}

// The order of threads in the next launches: 0 ascending, 1 descending, others random. Every launch
// takes the next one, unless FASTGPT_EMULATOR_SCHEDULE names one for all.
void set_schedule(unsigned schedule);

// Of all launches since the last call: passes over shared memory that ldmatrix took beyond one for
// each matrix.
uint64_t take_bank_conflicts();

// ---- for the device: what device.h and csrc/cuda/*.cuh are made of ----

// Where a collective stands in the source; threads that meet must stand at the same place.
struct Site {
  const char* file;
  int line;
};

[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] uint3 block_size();
[[gnu::const]] uint3 grid_dimensions();

// One array of the block for each tag.
void* static_shared(const void* tag, size_t bytes);
unsigned char* dynamic_shared();

enum class Vote { any, all, count };
int sync_threads(Vote vote, bool predicate, Site site);
void sync_warp(unsigned mask, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site);

// For instructions that name an address space, of which a GPU takes no other.
void require_global(const void* g_address);

void copy_async(void* s_to, const void* g_from, int bytes);
void commit_copies();
void wait_copies(int groups);

void load_matrices(uint32_t* r, int count, bool transposed, const void* s_row);
void mma_16x8x16(float* r_d, const uint32_t* r_a, const uint32_t* r_b, bool bf16);
void mma_16x8x8_tf32(float* r_d, const uint32_t* r_a, const uint32_t* r_b);

// 16 columns or rows of a matrix in shared memory, as csrc/cuda/wgmma.cuh has it.
struct SharedMatrix {
  const void* s_first;
  int panel_bytes;
};
void wgmma_begin();
void wgmma_commit();
void wgmma_wait(int groups);
void fence_shared();
void wgmma_ss(float* r_d, int n, SharedMatrix a, SharedMatrix b, bool add, bool bf16);
void wgmma_rs(float* r_d, int n, const uint32_t* r_a, SharedMatrix b, bool transposed, bool add,
              bool bf16);

uint32_t to_tf32(float x);
float exp2_approx(float x);
[[noreturn]] void trap();

}  // namespace fastgpt::emulator

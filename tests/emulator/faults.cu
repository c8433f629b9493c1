// Small kernels with a fault that the emulator must report, and the same kernels without it, which
// must pass, on many orders of threads.
#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/reduce.cuh"
#include "tests/emulator/faults.h"

namespace fastgpt::cases {
namespace {

using namespace cuda;

// ---- a pipeline of tiles: cp.async into two stages, ldmatrix, mma ----

enum Fault {
  kNone,
  kNoWait,
  kLaxWait,
  kNoBarrierAfterWait,
  kNoBarrierAtEnd,
  kRowsOutOfRange,
  kTileTooFew,
  kRowOffByOne,
  kMisaligned,
  kOtherSwizzle,
  kNoSwizzle,
  kEarlyReturn,
  kDivergentMma,
  kCopiesAtExit,
};

constexpr int kTileRows = 32, kTileChunks = 8, kTileThreads = 128;
constexpr int kTileBytes = kTileRows * kTileChunks * kChunkBytes;

template <Fault kFault>
__device__ int place_of(int row, int chunk) {
  if (kFault == kNoSwizzle) return row * kTileChunks + chunk;
  return swizzled<kTileChunks>(row, chunk);
}

template <Fault kFault>
__device__ void load_tile(const __nv_bfloat16* g_x, int rows, int tile, unsigned char* s_tile) {
  for (int i = threadIdx.x; i < kTileRows * kTileChunks; i += kTileThreads) {
    const int row = i / kTileChunks, chunk = i % kTileChunks;
    const int g_row = tile * kTileRows + row;
    const bool there = g_row < rows || kFault == kRowsOutOfRange;
    copy_chunk_async(s_tile + kChunkBytes * place_of<kFault>(row, chunk),
                     g_x + (g_row * kTileChunks + chunk) * 8, there ? kChunkBytes : 0);
  }
  commit_copies();
}

// g_sums: of the 64 columns of g_x. Each of four warps multiplies 16 of them by ones.
template <Fault kFault>
__global__ void column_sum_kernel(const __nv_bfloat16* g_x, int rows, float* g_sums) {
  FASTGPT_DYNAMIC_SHARED(s_stages);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int tiles = (rows + kTileRows - 1) / kTileRows - (kFault == kTileTooFew);
  if (kFault == kEarlyReturn && threadIdx.x == 77) return;
  const uint32_t one = pack_pair<__nv_bfloat16>(1.0f, 1.0f), ones[4] = {one, one, one, one};
  float r_sum[2][4] = {};
  load_tile<kFault>(g_x, rows, 0, s_stages);
  for (int tile = 0; tile < tiles; ++tile) {
    const bool more = tile + 1 < tiles || kFault == kCopiesAtExit;
    if (more) load_tile<kFault>(g_x, rows, tile + 1, s_stages + (tile + 1) % 2 * kTileBytes);
    if (kFault == kLaxWait) {
      wait_copies<2>();
    } else if (kFault != kNoWait) {
      more ? wait_copies<1>() : wait_copies<0>();
    }
    if (kFault != kNoBarrierAfterWait) __syncthreads();
    const unsigned char* s_tile = s_stages + tile % 2 * kTileBytes;
    for (int k = 0; k < kTileRows; k += 16) {
      for (int part = 0; part < 2; ++part) {
        const int row = k + lane % 16 + (kFault == kRowOffByOne), chunk = warp * 2 + part;
        const int place =
            kFault == kOtherSwizzle ? row * kTileChunks + chunk : place_of<kFault>(row, chunk);
        uint32_t r_x[2];
        load_matrices<2, true>(r_x, s_tile + kChunkBytes * place + 8 * (kFault == kMisaligned));
        if (kFault == kDivergentMma && lane >= 30) continue;
        mma_16x8x16<__nv_bfloat16>(r_sum[part], ones, r_x);
      }
    }
    if (kFault != kNoBarrierAtEnd) __syncthreads();
  }
  for (int part = 0; part < 2; ++part) {
    if (lane < 4) {
      g_sums[warp * 16 + part * 8 + lane * 2] = r_sum[part][0];
      g_sums[warp * 16 + part * 8 + lane * 2 + 1] = r_sum[part][1];
    }
  }
}

template <Fault kFault>
void sum_columns() {
  constexpr int kRows = 102;
  Buffer<__nv_bfloat16> x(kRows * 64);
  Buffer<float> sums(64);
  for (int i = 0; i < kRows * 64; ++i) {
    x[i] = __float2bfloat16_rn(static_cast<float>(i % 64 + i / 64 * i % 5));
  }
  const emulator::Memory memory;
  emulator::allow(x.data(), sizeof(__nv_bfloat16) * x.count());
  emulator::allow(sums.data(), sizeof(float) * sums.count());
  emulator::take_bank_conflicts();
  run_block(column_sum_kernel<kFault>, kTileThreads, 2 * kTileBytes, x.data(), kRows, sums.data());
  for (int column = 0; column < 64; ++column) {
    float want = 0.0f;
    for (int row = 0; row < kRows; ++row) want += to_float(x[row * 64 + column]);
    require_equal("sums", column, sums[column], want);
  }
  // Of the 4 warps, per tile 2 x 2 times 2 matrices.
  const uint64_t conflicts = emulator::take_bank_conflicts();
  require_equal<uint64_t>("bank conflicts a matrix", 0, conflicts / (4 * 4 * 2 * 4), 0);
}

const Register tiles[] = {
    {"a pipeline of tiles passes",
     [] {
       for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
         emulator::set_schedule(schedule);
         sum_columns<kNone>();
       }
     }},
    {"no wait for a copy",
     [] {
       expect_report({"reads 16 bytes", "faults.cu", "still in flight"}, sum_columns<kNoWait>);
     }},
    {"a wait for too few copies",
     [] { expect_report({"reads 16 bytes", "still in flight"}, sum_columns<kLaxWait>); }},
    {"no barrier after a wait",
     [] {
       expect_report({"16 bytes at offset", "of dynamic shared memory (8192 bytes)", "faults.cu:"},
                     sum_columns<kNoBarrierAfterWait>);
     }},
    {"no barrier at the end of a loop",
     [] {
       expect_report({"16 bytes at offset", "of dynamic shared memory (8192 bytes)", "faults.cu:"},
                     sum_columns<kNoBarrierAtEnd>);
     }},
    {"rows out of range",
     [] {
       expect_report({"reads 16 bytes out of bounds", "past a tensor of 13056 bytes"},
                     sum_columns<kRowsOutOfRange>);
     }},
    {"one tile too few", [] { expect_report({"sums[0]: expected"}, sum_columns<kTileTooFew>); }},
    {"one row too many",
     [] { expect_report({"reads ", "16 bytes ", "faults.cu:"}, sum_columns<kRowOffByOne>); }},
    {"a misaligned ldmatrix",
     [] {
       expect_report({"misaligned ldmatrix", "offset", "no multiple of 16"},
                     sum_columns<kMisaligned>);
     }},
    {"a swizzle that does not match",
     [] { expect_report({"sums[0]: expected"}, sum_columns<kOtherSwizzle>); }},
    {"no swizzle",
     [] {
       expect_report({"bank conflicts a matrix[0]: expected 0, got 7"}, sum_columns<kNoSwizzle>);
     }},
    {"early return before a barrier",
     [] {
       expect_report(
           {"deadlock", "threads 77 have returned", "wait in __syncthreads at ", "faults.cu:"},
           sum_columns<kEarlyReturn>);
     }},
    {"mma of a part of a warp",
     [] {
       expect_report({"waits in ", "comes to ", " mma at ", " ldmatrix at ", "faults.cu:"},
                     sum_columns<kDivergentMma>);
     }},
    {"copies in flight at the end",
     [] {
       expect_report({"returns with 2 copies in flight", "faults.cu"}, sum_columns<kCopiesAtExit>);
     }},
};

// ---- single accesses ----

// A kernel of 64 threads on 64 floats of global memory and the same of shared memory.
void run_small(void (*kernel)(float*)) {
  Buffer<float> x(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
  const emulator::Memory memory;
  emulator::allow(x.data(), sizeof(float) * x.count());
  run_block(kernel, 64, 0, x.data());
}

template <bool kSync>
__global__ void swap_neighbours_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 64);
  s_x[threadIdx.x] = 0.0f;
  __syncthreads();
  s_x[threadIdx.x] = g_x[threadIdx.x];
  if (kSync) __syncwarp();
  g_x[threadIdx.x] = s_x[threadIdx.x ^ 1];
}

template <bool kSync>
__global__ void swap_halves_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 64);
  s_x[threadIdx.x] = 0.0f;
  __syncthreads();
  s_x[threadIdx.x] = g_x[threadIdx.x];
  kSync ? __syncthreads() : __syncwarp();
  g_x[threadIdx.x] = s_x[threadIdx.x ^ 32];
}

__global__ void write_one_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 1);
  s_x[0] = g_x[threadIdx.x];
}

// Half a warp at a time, the other half by way of a vote, which orders nothing.
template <bool kSync>
__global__ void half_warp_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 64);
  const unsigned half = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
  s_x[threadIdx.x] = 0.0f;
  __syncthreads();
  s_x[threadIdx.x] = g_x[threadIdx.x];
  kSync ? __syncwarp(half) : static_cast<void>(__any_sync(half, true));
  g_x[threadIdx.x] = s_x[threadIdx.x ^ 15];
}

// Two threads write the two halves of a word: no race.
__global__ void halves_of_a_word_kernel(float* g_x) {
  FASTGPT_SHARED(__nv_bfloat16, s_x, 64);
  s_x[threadIdx.x] = from_float<__nv_bfloat16>(g_x[threadIdx.x]);
  __syncthreads();
  g_x[threadIdx.x] = to_float(s_x[63 - threadIdx.x]);
}

__global__ void unwritten_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 64);
  if (threadIdx.x != 9) s_x[threadIdx.x] = 1.0f;
  __syncthreads();
  g_x[threadIdx.x] = s_x[threadIdx.x];
}

__global__ void beyond_shared_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 64);
  float* s_next = s_x + static_cast<int>(g_x[1]);
  s_next[threadIdx.x] = 1.0f;
}

__global__ void beyond_global_kernel(float* g_x) {
  g_x[threadIdx.x + 1] = 1.0f;
}

__global__ void misaligned_kernel(float* g_x) {
  float r[4];
  load<4>(g_x + threadIdx.x % 2, r);
  if (threadIdx.x == 0) g_x[0] = r[0];
}

__global__ void much_static_kernel(float* g_x) {
  FASTGPT_DYNAMIC_SHARED(s_dynamic);
  FASTGPT_SHARED(float, s_static, kStaticSharedBytes / sizeof(float) + 4);
  s_static[threadIdx.x] = g_x[threadIdx.x];
  s_dynamic[threadIdx.x] = 0;
}

__global__ void local_array_kernel(float* g_x) {
  float r[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  g_x[threadIdx.x] = r[static_cast<int>(g_x[threadIdx.x]) % 5];
}

__global__ void divergent_barrier_kernel(float* g_x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  g_x[threadIdx.x] = 1.0f;
}

__global__ void early_return_kernel(float* g_x) {
  if (threadIdx.x == 40) return;
  g_x[threadIdx.x] = warp_sum(1.0f);
}

__global__ void foreign_lane_kernel(float* g_x) {
  if (threadIdx.x % 32 < 16) g_x[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void trap_kernel(float* g_x) {
  if (g_x[threadIdx.x] == 3.0f) __trap();
}

// What PTX says of a space, at addresses of another.
__global__ void store_to_shared_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 256);
  const float r[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  store<4>(s_x + threadIdx.x * 4, r);
  g_x[threadIdx.x] = s_x[threadIdx.x * 4];
}

__global__ void store_to_local_kernel(float* g_x) {
  alignas(16) float r_to[4] = {};
  const float r[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  store<4>(r_to, r);
  g_x[threadIdx.x] = r_to[threadIdx.x % 4];
}

__global__ void copy_to_global_kernel(float* g_x) {
  if (threadIdx.x < 8) copy_chunk_async(g_x + threadIdx.x * 4, g_x + threadIdx.x * 4 + 32);
  commit_copies();
  wait_copies<0>();
}

__global__ void copy_from_shared_kernel(float* g_x) {
  FASTGPT_SHARED(float, s_x, 512);
  for (int i = 0; i < 4; ++i) s_x[threadIdx.x * 4 + i] = g_x[threadIdx.x];
  copy_chunk_async(s_x + threadIdx.x * 4 + 256, s_x + threadIdx.x * 4);
  commit_copies();
  wait_copies<0>();
}

__global__ void matrix_in_global_kernel(float* g_x) {
  uint32_t r[1];
  load_matrices<1>(r, g_x + threadIdx.x % 8 * 4);
  g_x[threadIdx.x] = __uint_as_float(r[0]);
}

void passes(void (*kernel)(float*)) {
  for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
    emulator::set_schedule(schedule);
    run_small(kernel);
  }
}

void reports(std::initializer_list<const char*> parts, void (*kernel)(float*)) {
  expect_report(parts, [&] { run_small(kernel); });
}

const Register accesses[] = {
    {"ordered accesses pass",
     [] {
       passes(swap_neighbours_kernel<true>);
       passes(swap_halves_kernel<true>);
       passes(half_warp_kernel<true>);
       passes(halves_of_a_word_kernel);
     }},
    {"no __syncwarp",
     [] {
       reports({"race: thread", "s 4 bytes at offset", "there at tests/emulator/faults.cu:"},
               swap_neighbours_kernel<false>);
     }},
    {"__syncwarp instead of __syncthreads",
     [] { reports({"race: thread", "faults.cu:"}, swap_halves_kernel<false>); }},
    {"two threads write one place",
     [] { reports({"race: thread", " writes ", "wrote there"}, write_one_kernel); }},
    {"a vote instead of __syncwarp",
     [] { reports({"race: thread", "faults.cu:"}, half_warp_kernel<false>); }},
    {"unwritten shared memory",
     [] {
       reports({"thread 9 reads 4 bytes at offset 36", "256 bytes", "nobody wrote"},
               unwritten_kernel);
     }},
    {"beyond a shared array",
     [] { reports({"thread 63 writes out of bounds"}, beyond_shared_kernel); }},
    {"beyond a tensor",
     [] {
       reports({"thread 63 writes 4 bytes out of bounds",
                "faults.cu:", ": 4 bytes past a tensor of 256 bytes"},
               beyond_global_kernel);
     }},
    {"a misaligned load", [] { reports({"misaligned access", "copy.cuh:"}, misaligned_kernel); }},
    {"more static shared memory than a launch leaves room for",
     [] {
       expect_report({"more than 1 KiB of static shared memory beside dynamic"}, [] {
         const Buffer<float> x(64);
         run_block(much_static_kernel, 64, 256, x.data());
       });
     }},
    {"a store of global memory in shared memory",
     [] {
       reports({"thread ",
                " at csrc/cuda/copy.cuh:", "faults.cu:", "is in shared memory, must be in global"},
               store_to_shared_kernel);
     }},
    {"a store of global memory in local memory",
     [] { reports({"is in local memory, must be in global"}, store_to_local_kernel); }},
    {"a copy to global memory",
     [] {
       reports({"the destination of a copy", "is in global memory, must be in shared"},
               copy_to_global_kernel);
     }},
    {"a copy from shared memory",
     [] {
       reports({"the source of a copy", "is in shared memory, must be in global"},
               copy_from_shared_kernel);
     }},
    {"an ldmatrix of global memory",
     [] {
       reports({"a row of ldmatrix", "is in global memory, must be in shared"},
               matrix_in_global_kernel);
     }},
    {"beyond a local array",
     [] { reports({"index 4 out of bounds of an array at", "faults.cu:"}, local_array_kernel); }},
    {"barriers of two branches",
     [] {
       reports({"waits in __syncthreads at", "comes to __syncthreads"}, divergent_barrier_kernel);
     }},
    {"early return before a shuffle",
     [] {
       reports({"deadlock", "40 have returned", "wait in a shuffle at csrc/cuda/reduce.cuh:", " < ",
                "faults.cu:"},
               early_return_kernel);
     }},
    {"a shuffle from a lane that takes no part",
     [] { reports({"shuffles at", "from lane", "does not take part"}, foreign_lane_kernel); }},
    {"a trap", [] { reports({"thread 3 traps at", "faults.cu:"}, trap_kernel); }},
};

}  // namespace
}  // namespace fastgpt::cases

// Small kernels with a fault that the emulator must report, and the same kernels without it, which
// must pass, on many orders of threads.
#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/wgmma.cuh"
#include "tests/emulator/cases.h"

namespace fastgpt::cases {
namespace {

using namespace cuda;

constexpr unsigned kSchedules = 12;

// Every order of threads must give a report that holds each of `parts`.
void expect_report(std::initializer_list<const char*> parts, const std::function<void()>& run) {
  for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
    emulator::set_schedule(schedule);
    std::string report = "nothing";
    try {
      run();
    } catch (const std::runtime_error& error) {
      report = error.what();
    }
    for (const char* part : parts) {
      require(report.find(part) != std::string::npos, "schedule " + std::to_string(schedule) +
                                                          ": expected a report with \"" + part +
                                                          "\", got: " + report);
    }
  }
}

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

// ---- a pipeline of products of a warpgroup ----

enum ProductFault {
  kSound,
  kNoProductWait,
  kLaxProductWait,
  kNoLastWait,
  kReadEarly,
  kWrittenEarly,
  kNoFence,
  kFenceTooLate,
  kStoreAfterFence,
  kNoProductBarrier,
  kTileOverwritten,
  kTileOverwrittenAfterWait,
  kNoBegin,
  kPanelNotSwizzled,
  kPanelMisaligned,
  kColumnsMisaligned,
  kPanelTooFar,
  kPanelInGlobal,
  kOneWarpLess,
  kOneLaneElsewhere,
  kHalfWarpgroup,
  kOldDevice,
};

constexpr int kPanelBytes = 64 * kPanelRowBytes, kPanels = 3;

// A panel of 64 x 64.
template <ProductFault kFault>
__device__ void load_panel(const __nv_bfloat16* g_x, unsigned char* s_panel) {
  for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) {
    const int place = kFault == kPanelNotSwizzled ? i : swizzled<8>(i / 8, i % 8);
    copy_chunk_async(s_panel + kChunkBytes * place, g_x + i * 8);
  }
  commit_copies();
}

// d (64 x 64) = the sum of a b^T of each panel b, which has two stages; a (64 x 64).
template <ProductFault kFault>
__global__ void product_kernel(const __nv_bfloat16* g_a, const __nv_bfloat16* g_b, float* g_d) {
  FASTGPT_DYNAMIC_SHARED(s_a);
  unsigned char* s_stages = s_a + kPanelBytes + 128 * (kFault == kPanelMisaligned);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float r_d[8][4] = {}, early = 0.0f;
  load_panel<kFault>(g_a, s_a);
  load_panel<kFault>(g_b, s_stages);
  for (int panel = 0; panel < kPanels; ++panel) {
    const bool more = panel + 1 < kPanels;
    unsigned char* s_b = s_stages + panel % 2 * kPanelBytes;
    unsigned char* s_next = s_stages + (panel + 1) % 2 * kPanelBytes;
    const __nv_bfloat16* g_next = g_b + (panel + 1) * 64 * 64;
    wait_copies<0>();
    if (kFault != kNoFence && kFault != kFenceTooLate) fence_shared();
    if (kFault == kStoreAfterFence && threadIdx.x == 9) s_b[8 * kChunkBytes] = 0;  // its own
    if (kFault != kNoProductBarrier) __syncthreads();
    if (kFault == kFenceTooLate) fence_shared();
    if (kFault != kNoBegin) wgmma_begin();
    for (int k = 0; k < 4; ++k) {
      if (kFault == kOneWarpLess && warp == 3 && panel == 2) continue;
      const void* s_first = s_b + 32 * k + 16 * (kFault == kColumnsMisaligned);
      if (kFault == kPanelTooFar) s_first = s_b + 2 * kPanelBytes;
      if (kFault == kPanelInGlobal) s_first = g_b;
      if (kFault == kOneLaneElsewhere && threadIdx.x == 70) s_first = s_a;
      wgmma_ss<__nv_bfloat16, 64>(r_d, shared_matrix(s_a + 32 * k, 0), shared_matrix(s_first, 0),
                                  true);
    }
    wgmma_commit();
    if (kFault == kReadEarly) early = r_d[0][0];
    if (kFault == kWrittenEarly && threadIdx.x == 5) r_d[7][3] = 0.0f;
    if (more && kFault == kTileOverwritten) load_panel<kFault>(g_next, s_b);
    if (more && kFault != kTileOverwrittenAfterWait) load_panel<kFault>(g_next, s_next);
    if (kFault == kLaxProductWait) {
      wgmma_wait<1>();
    } else if (kFault != kNoProductWait && (more || kFault != kNoLastWait)) {
      wgmma_wait<0>();
    }
    if (more && kFault == kTileOverwrittenAfterWait) load_panel<kFault>(g_next, s_b);
  }
  for (int n = 0; n < 8; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * warp + lane / 4 + e / 2 * 8;
      g_d[row * 64 + n * 8 + lane % 4 * 2 + e % 2] = r_d[n][e] + early;
    }
  }
}

template <ProductFault kFault>
void multiply() {
  Buffer<__nv_bfloat16> a(64 * 64), b(kPanels * 64 * 64);
  Buffer<float> d(64 * 64);
  for (int i = 0; i < 64 * 64; ++i) a[i] = __float2bfloat16_rn(static_cast<float>(i * 7 % 11 - 5));
  for (int i = 0; i < kPanels * 64 * 64; ++i) {
    b[i] = __float2bfloat16_rn(static_cast<float>(i * i % 13 - 6));
  }
  const emulator::Memory memory;
  emulator::allow(a.data(), sizeof(__nv_bfloat16) * a.count());
  emulator::allow(b.data(), sizeof(__nv_bfloat16) * b.count());
  emulator::allow(d.data(), sizeof(float) * d.count());
  emulator::set_compute_capability(kFault == kOldDevice ? 80 : 90);
  run_block(product_kernel<kFault>, kFault == kHalfWarpgroup ? kWarpgroup / 2 : kWarpgroup,
            3 * kPanelBytes + 128 * (kFault == kPanelMisaligned), a.data(), b.data(), d.data());
  for (int i = 0; i < 64 * 64; ++i) {
    float want = 0.0f;
    for (int k = 0; k < 64; ++k) {
      for (int panel = 0; panel < kPanels; ++panel) {
        want += to_float(a[i / 64 * 64 + k]) * to_float(b[(panel * 64 + i % 64) * 64 + k]);
      }
    }
    require_equal("d", i, d[i], want);
  }
}

const Register products[] = {
    {"a pipeline of products passes",
     [] {
       for (unsigned schedule = 0; schedule < kSchedules; ++schedule) {
         emulator::set_schedule(schedule);
         multiply<kSound>();
       }
     }},
    {"no wait for a product",
     [] {
       expect_report({"writes 16 bytes", "of dynamic shared", "which a product of", "still reads"},
                     multiply<kNoProductWait>);
     }},
    {"a wait for too few products",
     [] {
       expect_report({"writes 16 bytes", "which a product of", "faults.cu:", "still reads"},
                     multiply<kLaxProductWait>);
     }},
    {"products under way at the end",
     [] {
       expect_report({"returns with 4 products under way", "faults.cu:"}, multiply<kNoLastWait>);
     }},
    {"an accumulator read before the wait",
     [] { expect_report({"d[0]: expected", "nan"}, multiply<kReadEarly>); }},
    {"an accumulator written before the wait",
     [] {
       expect_report({"thread 5 has written an accumulator of a product of", "faults.cu:"},
                     multiply<kWrittenEarly>);
     }},
    {"no fence before a product",
     [] {
       expect_report(
           {"multiplies 16 bytes", "wrote there at", "has not called fence_shared() since"},
           multiply<kNoFence>);
     }},
    {"a fence after the barrier",
     [] {
       expect_report({"multiplies 16 bytes", "has called fence_shared() only after"},
                     multiply<kFenceTooLate>);
     }},
    {"a store after the fence",
     [] {
       expect_report({"multiplies 16 bytes at offset 8320", "thread 9 wrote there at",
                      "has not called fence_shared() since"},
                     multiply<kStoreAfterFence>);
     }},
    {"no barrier before a product",
     [] { expect_report({"16 bytes at offset", "faults.cu:"}, multiply<kNoProductBarrier>); }},
    {"a tile overwritten before the wait",
     [] {
       expect_report({"writes 16 bytes", "which a product of", "still reads"},
                     multiply<kTileOverwritten>);
     }},
    {"a tile overwritten before the waits of all",
     [] {
       expect_report({"writes 16 bytes", "faults.cu:", " read"},
                     multiply<kTileOverwrittenAfterWait>);
     }},
    {"no wgmma_begin",
     [] {
       expect_report({"multiplies at", "without wgmma_begin() since its last wait"},
                     multiply<kNoBegin>);
     }},
    {"a panel that is not swizzled",
     [] { expect_report({"d[1]: expected"}, multiply<kPanelNotSwizzled>); }},
    {"a misaligned panel",
     [] {
       expect_report({"misaligned panel of a product at", "offset 128"},
                     multiply<kPanelMisaligned>);
     }},
    {"misaligned columns of a panel",
     [] {
       expect_report({"misaligned columns of a product at", "byte 16"},
                     multiply<kColumnsMisaligned>);
     }},
    {"a product beyond shared memory",
     [] { expect_report({"reads out of bounds", "faults.cu:"}, multiply<kPanelTooFar>); }},
    {"a product of global memory",
     [] {
       expect_report({"a matrix of a product", "is in global memory, must be in shared"},
                     multiply<kPanelInGlobal>);
     }},
    {"a product without a warp of its warpgroup",
     [] { expect_report({"of its warpgroup", "faults.cu:"}, multiply<kOneWarpLess>); }},
    {"a product of two matrices",
     [] {
       expect_report({"threads 64 and 70 multiply at", "by different matrices"},
                     multiply<kOneLaneElsewhere>);
     }},
    {"half a warpgroup",
     [] {
       expect_report({"in a block of 64 threads", "not whole warpgroups"},
                     multiply<kHalfWarpgroup>);
     }},
    {"wgmma on an older device",
     [] { expect_report({"compute capability 80 does not have"}, multiply<kOldDevice>); }},
};

}  // namespace
}  // namespace fastgpt::cases

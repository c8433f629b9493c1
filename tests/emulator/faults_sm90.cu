// A pipeline of products of a warpgroup: with each fault that the emulator must report, and with
// none, on many orders of threads.
#include "csrc/cuda/wgmma.cuh"
#include "tests/emulator/faults.h"

namespace fastgpt::cases {
namespace {

using namespace cuda;

enum Fault {
  kNone,
  kNoWait,
  kLaxWait,
  kNoLastWait,
  kReadEarly,
  kWrittenEarly,
  kNoFence,
  kFenceTooLate,
  kStoreAfterFence,
  kNoBarrier,
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
template <Fault kFault>
__device__ void load_panel(const __nv_bfloat16* g_x, unsigned char* s_panel) {
  for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) {
    const int place = kFault == kPanelNotSwizzled ? i : swizzled<8>(i / 8, i % 8);
    copy_chunk_async(s_panel + kChunkBytes * place, g_x + i * 8);
  }
  commit_copies();
}

// d (64 x 64) = the sum of a b^T of each panel b, which has two stages; a (64 x 64).
template <Fault kFault>
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
    if (kFault != kNoBarrier) __syncthreads();
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
    if (kFault == kLaxWait) {
      wgmma_wait<1>();
    } else if (kFault != kNoWait && (more || kFault != kNoLastWait)) {
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

template <Fault kFault>
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
         multiply<kNone>();
       }
     }},
    {"no wait for a product",
     [] {
       expect_report({"writes 16 bytes", "of dynamic shared", "which a product of", "still reads"},
                     multiply<kNoWait>);
     }},
    {"a wait for too few products",
     [] {
       expect_report({"writes 16 bytes", "which a product of", "faults_sm90.cu:", "still reads"},
                     multiply<kLaxWait>);
     }},
    {"products under way at the end",
     [] {
       expect_report({"returns with 4 products under way", "faults_sm90.cu:"},
                     multiply<kNoLastWait>);
     }},
    {"an accumulator read before the wait",
     [] { expect_report({"d[0]: expected", "nan"}, multiply<kReadEarly>); }},
    {"an accumulator written before the wait",
     [] {
       expect_report({"thread 5 has written an accumulator of a product of", "faults_sm90.cu:"},
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
     [] { expect_report({"16 bytes at offset", "faults_sm90.cu:"}, multiply<kNoBarrier>); }},
    {"a tile overwritten before the wait",
     [] {
       expect_report({"writes 16 bytes", "which a product of", "still reads"},
                     multiply<kTileOverwritten>);
     }},
    {"a tile overwritten before the waits of all",
     [] {
       expect_report({"writes 16 bytes", "faults_sm90.cu:", " read"},
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
     [] { expect_report({"reads out of bounds", "faults_sm90.cu:"}, multiply<kPanelTooFar>); }},
    {"a product of global memory",
     [] {
       expect_report({"a matrix of a product", "is in global memory, must be in shared"},
                     multiply<kPanelInGlobal>);
     }},
    {"a product without a warp of its warpgroup",
     [] { expect_report({"of its warpgroup", "faults_sm90.cu:"}, multiply<kOneWarpLess>); }},
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

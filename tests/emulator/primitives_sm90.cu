// The primitives of csrc/cuda/wgmma.cuh against plain loops. On a GPU they are compiled for sm_90a
// alone and run on a device of compute capability 9.0 alone.
#include "csrc/cuda/wgmma.cuh"
#include "tests/emulator/cases.h"

namespace fastgpt::cases {
namespace {

using namespace cuda;

constexpr int kRows = 64, kStep = 16;

// Small integers, so that every sum is exact in any order; all rows and columns differ.
float a_of(int row, int k) {
  return static_cast<float>((row * 5 + k * 3 + row * k) % 17 - 8);
}
float b_of(int k, int column) {
  return static_cast<float>((k * 7 + column * 2 + k * k * column) % 13 - 6);
}
float d_of(int row, int column) {
  return static_cast<float>(row * 8 + column);
}

constexpr int panels_of(int columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

// A matrix of kColumns columns, a multiple of 8, into panels of `rows` rows.
template <typename T, int kColumns>
__device__ void lay_out(const T* g_from, int rows, unsigned char* s_to) {
  constexpr int kChunks = kColumns / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    unsigned char* s_panel = s_to + chunk / 8 * rows * kPanelRowBytes;
    store_chunk(s_panel + kChunkBytes * swizzled<8>(row, chunk % 8), load_chunk(g_from + i * 8));
  }
}

// g_d (64 x kN) in and out, of each warpgroup.
template <int kN, typename Visit>
__device__ void visit_accumulators(const Visit& visit) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int n = 0; n < kN / 8; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int row = 16 * warp + lane / 4 + e / 2 * 8;
      visit(n, e, row * kN + n * 8 + lane % 4 * 2 + e % 2);
    }
  }
}

// d = a b^T in the first warpgroup, d += a b^T in the second; of 128 columns, in two panels.
template <typename T, int kN>
__global__ void shared_kernel(const T* g_a, const T* g_b, float* g_d) {
  FASTGPT_DYNAMIC_SHARED(s_a);
  constexpr int kColumns = 128;
  unsigned char* s_b = s_a + kRows * kColumns * sizeof(T);
  lay_out<T, kColumns>(g_a, kRows, s_a);
  lay_out<T, kColumns>(g_b, kN, s_b);
  fence_shared();
  __syncthreads();
  float r_d[kN / 8][4];
  visit_accumulators<kN>([&](int n, int e, int i) { r_d[n][e] = g_d[i]; });
  hold(r_d);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kColumns; k += kStep) {
    const int panel = k / kPanelColumns, within = k % kPanelColumns * static_cast<int>(sizeof(T));
    wgmma_ss<T, kN>(r_d, shared_matrix(s_a + panel * kRows * kPanelRowBytes + within, 0),
                    shared_matrix(s_b + panel * kN * kPanelRowBytes + within, 0),
                    k > 0 || threadIdx.x >= kWarpgroup);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(r_d);
  visit_accumulators<kN>([&](int n, int e, int i) { g_d[i] = r_d[n][e]; });
}

// d = a b in the first warpgroup, d += a b in the second, of 64 columns of a, a group each; or, if
// kTransposed, a b^T.
template <typename T, int kN, bool kTransposed>
__global__ void register_kernel(const float* g_a, const T* g_b, float* g_d) {
  FASTGPT_DYNAMIC_SHARED(s_b);
  constexpr int kDepth = 64;
  kTransposed ? lay_out<T, kDepth>(g_b, kN, s_b) : lay_out<T, kN>(g_b, kDepth, s_b);
  fence_shared();
  __syncthreads();
  float r_d[kN / 8][4];
  visit_accumulators<kN>([&](int n, int e, int i) { r_d[n][e] = g_d[i]; });
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t r_a[kDepth / kStep][4];
#pragma unroll
  for (int k = 0; k < kDepth; k += kStep) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * (warp % 4) + lane / 4 + i % 2 * 8;
      const float* g_pair = g_a + row * kDepth + k + lane % 4 * 2 + i / 2 * 8;
      r_a[k / kStep][i] = pack_pair<T>(g_pair[0], g_pair[1]);
    }
  }
  hold(r_d);
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kDepth; k += kStep) {
    const unsigned char* s_step = s_b + k * (kTransposed ? int{sizeof(T)} : kPanelRowBytes);
    wgmma_rs<T, kN, kTransposed>(r_d, r_a[k / kStep],
                                 shared_matrix(s_step, kDepth * kPanelRowBytes),
                                 k > 0 || threadIdx.x >= kWarpgroup);
    wgmma_commit();
  }
  wgmma_wait<0>();
  hold(r_d);
  visit_accumulators<kN>([&](int n, int e, int i) { g_d[i] = r_d[n][e]; });
}

bool runs() {
#if defined(FASTGPT_EMULATED)
  emulator::set_compute_capability(90);
#endif
  return compute_capability() == 90;
}

template <typename T>
struct Matrix : Buffer<T> {
  Matrix(int rows, int columns, float (*value)(int row, int column))
      : Buffer<T>(static_cast<size_t>(rows) * static_cast<size_t>(columns)) {
    for (int i = 0; i < rows * columns; ++i) {
      (*this)[static_cast<size_t>(i)] = static_cast<T>(value(i / columns, i % columns));
    }
  }
};

void check(const Buffer<float>& d, int n, int depth) {
  for (int i = 0; i < static_cast<int>(d.count()); ++i) {
    const int row = i / n, column = i % n;
    float want = row >= kRows ? d_of(row, column) : 0.0f;
    for (int k = 0; k < depth; ++k) want += a_of(row % kRows, k) * b_of(k, column);
    require_equal("d", static_cast<size_t>(i), d[static_cast<size_t>(i)], want);
  }
}

template <typename T, int kN>
void check_shared() {
  if (!runs()) return;
  constexpr int kDepth = 128;
  const Matrix<T> a(kRows, kDepth, a_of);
  const Matrix<T> b(kN, kDepth, [](int column, int k) { return b_of(k, column); });
  const Matrix<float> d(2 * kRows, kN, d_of);
  run_block(shared_kernel<T, kN>, 2 * kWarpgroup, (kRows + kN) * kDepth * sizeof(T), a.data(),
            b.data(), d.data());
  check(d, kN, kDepth);
}

template <typename T, int kN, bool kTransposed = false>
void check_registers() {
  if (!runs()) return;
  constexpr int kDepth = 64;
  const Matrix<float> a(kRows, kDepth, a_of);
  const Matrix<T> straight(kDepth, kN, b_of);
  const Matrix<T> transposed(kN, kDepth, [](int column, int k) { return b_of(k, column); });
  const Matrix<float> d(2 * kRows, kN, d_of);
  const T* b = kTransposed ? transposed.data() : straight.data();
  run_block(register_kernel<T, kN, kTransposed>, 2 * kWarpgroup,
            kTransposed ? kN * kPanelRowBytes : panels_of(kN) * kDepth * kPanelRowBytes, a.data(),
            b, d.data());
  check(d, kN, kDepth);
}

template <typename T>
void check_all_registers() {
  check_registers<T, 48>();
  check_registers<T, 64>();
  check_registers<T, 80>();
  check_registers<T, 96>();
  check_registers<T, 128>();
  check_registers<T, 48, true>();
  check_registers<T, 64, true>();
  check_registers<T, 96, true>();
  check_registers<T, 112, true>();
  check_registers<T, 128, true>();
}

const Register products[] = {
    {"wgmma of bfloat16 in shared memory",
     [] {
       check_shared<__nv_bfloat16, 48>();
       check_shared<__nv_bfloat16, 64>();
       check_shared<__nv_bfloat16, 96>();
       check_shared<__nv_bfloat16, 128>();
     }},
    {"wgmma of float16 in shared memory",
     [] {
       check_shared<__half, 48>();
       check_shared<__half, 64>();
       check_shared<__half, 96>();
       check_shared<__half, 128>();
     }},
    {"wgmma of bfloat16 in registers", check_all_registers<__nv_bfloat16>},
    {"wgmma of float16 in registers", check_all_registers<__half>},
};

}  // namespace
}  // namespace fastgpt::cases

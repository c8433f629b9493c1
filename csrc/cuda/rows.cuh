// How the row kernels walk rows (r, n): a row belongs to the threads along x of one block, in packs
// of up to 16 bytes; it stays in registers where it fits. Short rows share a block along y.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "csrc/common/dispatch.h"
#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

constexpr int kCachedPacks = 4;      // packs of a row that one thread keeps in registers
constexpr int kMaxRowThreads = 512;  // of a block: each may have 128 registers

template <typename T>
__device__ inline T* row_of(const TensorRef& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.stride[0];
}

// f(index of the pack among this thread's, first element) for each of the thread's packs of a row.
template <int kPack, bool kCached, typename F>
__device__ inline void for_packs(int n, const F& f) {
  const int step = blockDim.x * kPack;
  if constexpr (kCached) {
#pragma unroll
    for (int c = 0; c < kCachedPacks; ++c) {
      const int i = c * step + static_cast<int>(threadIdx.x) * kPack;
      if (i < n) f(c, i);
    }
  } else {
    for (int i = threadIdx.x * kPack; i < n; i += step) f(0, i);
  }
}

static inline int element_bytes(const TensorRef& t) {
  return t.dtype == DType::f32 ? 4 : 2;
}

// Also asked of a single row's stride, so that a row has the same bits alone as among others.
static inline bool aligned(const TensorRef& t, int pack) {
  if (t.data == nullptr) return true;
  const int bytes = pack * element_bytes(t) < 16 ? pack * element_bytes(t) : 16;
  const bool start = reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
  return start && t.stride[0] * element_bytes(t) % bytes == 0;
}

struct RowPlan {
  int pack;       // elements that are moved at once
  bool anywhere;  // packs of 16 bytes do not lie at addresses that they divide
  bool cached;    // a row fits the registers
  int threads;    // of a row
  int rows;       // of a block
};

// For rows of n elements of these tensors, in packs of `pack` or half of it, or one by one. A
// function of n and of alignment; with `shift` whole packs in any case, for anywhere.cuh. A thread
// takes several packs, whose loads are under way together.
static inline RowPlan plan_rows(int64_t n, int pack, std::initializer_list<TensorRef> tensors,
                                bool shift = false) {
  check_at_most(n, int64_t{1} << 30, "elements of a row");  // the kernels count in int
  const auto fits = [&](int elements) {
    bool all = n % elements == 0;
    for (const TensorRef& t : tensors) all = all && aligned(t, elements);
    return all;
  };
  RowPlan plan;
  plan.anywhere = !fits(pack);
  plan.pack = !plan.anywhere || shift ? pack : fits(pack / 2) ? pack / 2 : 1;
  const int packs = static_cast<int>((n + plan.pack - 1) / plan.pack);
  constexpr int kWarpPacks = kWarp * kCachedPacks;
  const int warps = std::max(1, (packs + kWarpPacks - 1) / kWarpPacks);
  plan.threads = std::min(warps * kWarp, kMaxRowThreads);
  plan.cached = packs <= plan.threads * kCachedPacks && !(plan.anywhere && shift);
  constexpr int kShortRows = 4;
  plan.rows = plan.threads == kWarp ? kShortRows : 1;  // a warp needs no barrier for its row
  return plan;
}

// The elements of t in 16 bytes.
static inline int pack_of(const TensorRef& t) {
  return 16 / element_bytes(t);
}

static inline dim3 grid_of_rows(const RowPlan& plan, int64_t r) {
  return dim3(grid_size((r + plan.rows - 1) / plan.rows));
}

static inline dim3 block_of_rows(const RowPlan& plan) {
  return dim3(plan.threads, plan.rows);
}

// f(Constant<the plan's pack>), of a plan in packs of up to kPack.
template <int kPack, typename F>
void visit_pack(const RowPlan& plan, const F& f) {
  if (plan.pack == kPack) return f(Constant<kPack>{});
  plan.pack == kPack / 2 ? f(Constant<kPack / 2>{}) : f(Constant<1>{});
}

// f(Type<T>, Type<Y>, Constant<pack>, Constant<cached>): T of `dtype`, Y the same or float.
template <typename F>
void visit_rows(const RowPlan& plan, DType dtype, DType other, const F& f) {
  visit_dtype<__nv_bfloat16, __half>(dtype, [&](auto type) {
    constexpr int kWide = 16 / sizeof(typename decltype(type)::type);
    const auto with_other = [&](auto other_type) {
      visit_pack<kWide>(plan, [&](auto pack) {
        visit_bool(plan.cached, [&](auto cached) { f(type, other_type, pack, cached); });
      });
    };
    other == dtype ? with_other(type) : with_other(Type<float>{});
  });
}

}  // namespace fastgpt::cuda

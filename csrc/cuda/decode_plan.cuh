// How decode cuts its work. The keys of a split are a function of the shape of one sequence, so
// that its bits are; how many splits a block takes in turn depends on the batch and on the GPU.
#pragma once

#include <algorithm>

#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention.h"

namespace fastgpt::cuda {

constexpr int kMostSplits = 64;
constexpr int64_t kSplitBytes = 65536;      // less would be merged no sooner than it is read
constexpr int64_t kFewestKeys = 64;         // of a split, whose keys are a multiple of so many
constexpr int kMostRun = 8;                 // more would leave ragged sequences to few blocks
constexpr int64_t kFar = int64_t{1} << 61;  // sums of a few such positions do not overflow

struct DecodePlan {
  int hk, group, t;
  int rows;        // of a block, of the group * t queries that share a key head
  int row_blocks;  // of a key head
  int splits;
  int split_keys;
  int run, runs;   // splits of a block, blocks of the keys of a sequence
  int64_t window;  // 0: none
  bool aligned;    // chunks of 16 bytes, else single elements
};

// Also asked of strides that a batch of one does not use: its bits are those it has among others.
static inline bool aligned(const TensorRef& t) {
  if (t.data == nullptr) return true;
  const int64_t pack = t.dtype == DType::f32 ? 4 : 8;
  bool whole = reinterpret_cast<uintptr_t>(t.data) % kChunkBytes == 0 && t.size[3] % pack == 0;
  for (int i = 0; i < 3; ++i) whole = whole && t.stride[i] % pack == 0;
  return whole;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// All but the run. columns: of the kernel, at least head_dim.
static inline DecodePlan plan_decode(const DecodeAttention& p, int64_t columns) {
  const int64_t capacity = p.k_cache.size[2], t = p.q.size[2];
  const int64_t group = p.q.size[1] / p.k_cache.size[1], rows = group * t;
  check_at_most(rows, int64_t{1} << 30, "queries of a key head");  // the kernels count in int
  DecodePlan plan;
  plan.hk = static_cast<int>(p.k_cache.size[1]);
  plan.group = static_cast<int>(group);
  plan.t = static_cast<int>(t);
  const bool wide = p.q.dtype == DType::f32;
  plan.rows = wide ? (rows == 1 ? 1 : 8) : (rows <= 8 ? 8 : 16);
  plan.row_blocks = static_cast<int>(ceil_div(rows, plan.rows));
  // Where no position is further away than the cache is long, the band hides nothing.
  const bool banded = p.window > 0 && (p.ring || p.window < capacity);
  plan.window = banded ? std::min(p.window, kFar) : 0;
  const int64_t span = banded ? std::min(capacity, plan.window + t - 1) : capacity;
  int64_t keys = kSplitBytes / (2 * columns * (wide ? 4 : 2)) / kFewestKeys * kFewestKeys;
  keys = std::max(keys, kFewestKeys);
  const int64_t most = std::max<int64_t>(1, kMostSplits / ceil_div(t, 16));
  while (span > keys * most) keys *= 2;
  plan.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(span, keys)));
  check_at_most(keys * kMostRun, int64_t{1} << 30, "keys of a block");
  plan.split_keys = static_cast<int>(keys);
  plan.aligned = aligned(p.q) && aligned(p.k_cache) && aligned(p.v_cache) && aligned(p.k_new) &&
                 aligned(p.v_new);
  return plan;
}

// Chooses how many splits make a run: long ones begin less often, short ones fill the last wave of
// blocks better. block_bytes: of shared memory.
static inline void choose_run(DecodePlan& plan, int64_t sequences, int block_bytes) {
  constexpr double kStart = 0.25;      // in times of a split: until a block's first tile is there
  constexpr int64_t kReserved = 1024;  // bytes that the system takes of a block's shared memory
  const auto room = static_cast<int64_t>(block_shared_bytes()) + kReserved;
  const int64_t fit = std::clamp<int64_t>(room / (block_bytes + kReserved), 1, 4);
  double best = 0.0;
  for (int run = 1; run <= std::min(kMostRun, plan.splits); ++run) {
    const int64_t runs = ceil_div(plan.splits, run);
    const int64_t waves = ceil_div(sequences * plan.row_blocks * runs, fit * multiprocessors());
    const double time = static_cast<double>(waves) * (run + kStart);
    if (run > 1 && time >= best) continue;
    best = time;
    plan.run = run;
    plan.runs = static_cast<int>(runs);
  }
}

}  // namespace fastgpt::cuda

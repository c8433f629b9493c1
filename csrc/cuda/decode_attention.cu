// The t newest queries of each sequence over its cache: query i stands at position total - t + i,
// position p lives in slot p (mod capacity in a ring). out = softmax(scale q k^T) v.
//
// Plan: a block takes up to 16 of the queries that share a key head over a run of splits of the
// keys that they see; its warps take tiles in turn, each on its own, with two tiles on their way,
// those of the next split under the end of the last. The warps of a split, two and two, and then
// the splits (a second kernel) are merged in a fixed order. The keys of a split depend on the
// capacity, t, window, d and dtype alone, and how many splits make a run changes no bit; lengths
// are read on the device. New keys are read from k_new by everyone, and copied to their slots,
// which nobody reads, by the blocks in turn.
// Bytes: the visible k and v once for 8 (float) or 16 queries. Flops: 4 t d a key and query head.
// Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#include "csrc/common/dispatch.h"
#include "csrc/cuda/decode_plan.cuh"
#include "csrc/cuda/decode_tile.cuh"
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention.h"

namespace fastgpt::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kMergeSplits = 8;  // that a block of the merge adds at once
constexpr int kFloatBytes = sizeof(float);

// A warp's two buffers hold more of a row the longer the row is: two warps fill an SM then.
template <int kD>
constexpr int kWarps = kD > 128 ? 2 : 4;

template <typename T, int kD, int kRows>
struct Layout {
  using Tile = DecodeTile<T, kD, kRows>;
  static constexpr int kTileChunks = Tile::kKeys * Tile::kChunks;
  static constexpr int kStageChunks = kWarps<kD> * 2 * kTileChunks;  // k and v of every warp
  static constexpr int kQueryChunks = kRows * Tile::kChunks;
  static constexpr int kResultFloats = kRows * (WarpResult<kD>::kStep + 2);  // of two warps
  // All of it dynamic: what static memory there is begins a KiB of its own.
  static constexpr int kBytes = (kStages * kStageChunks + kQueryChunks) * kChunkBytes +
                                (kWarps<kD> / 2 * kResultFloats + 2 * kRows) * kFloatBytes;
};

__device__ int64_t count_at(const TensorRef& counts, int64_t b) {
  const int64_t count = counts.dtype == DType::i64 ? static_cast<const int64_t*>(counts.data)[b]
                                                   : static_cast<const int32_t*>(counts.data)[b];
  return max(-kFar, min(count, kFar));
}

__device__ int clamp(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(max(low, min(x, high)));
}

// The slot of a position, or -1 where there is none.
__device__ int64_t slot_of(const DecodeAttention& p, int64_t position) {
  const int64_t capacity = p.k_cache.size[2];
  if (p.ring) return (position % capacity + capacity) % capacity;
  return position >= 0 && position < capacity ? position : -1;
}

// What a block of queries sees of a sequence: the positions [begin, end), each of which is new or
// has a slot.
struct Visible {
  int64_t length;  // before the append
  int64_t query;   // where query 0 stands
  int64_t begin, end;
};

__device__ Visible visible_keys(const DecodeAttention& p, const DecodePlan& plan, int64_t b,
                                int row_block) {
  const int first = row_block * plan.rows / plan.group;
  const int last = min((row_block * plan.rows + plan.rows - 1) / plan.group, plan.t - 1);
  Visible v;
  v.length = count_at(p.cache_lengths, b);
  const int64_t total = v.length + (p.k_new.data == nullptr ? 0 : p.k_new.size[2]);
  v.query = total - plan.t;
  v.begin = p.cache_start.data == nullptr ? 0 : max(count_at(p.cache_start, b), int64_t{0});
  if (plan.window > 0) v.begin = max(v.begin, v.query + first - plan.window + 1);
  v.end = v.query + last + 1;
  if (p.ring) {
    v.begin = max(v.begin, total - p.k_cache.size[2]);
  } else {
    v.end = min(v.end, p.k_cache.size[2]);
  }
  v.end = max(v.begin, v.end);
  return v;
}

template <typename T>
__device__ T* row_at(const TensorRef& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(t.data) + b * t.stride[0] + h * t.stride[1] + i * t.stride[2];
}

// Chunk `chunk` of a row of d elements; what is beyond d is 0.
template <typename T>
__device__ uint4 load_row_chunk(const T* g_row, int chunk, int d, bool aligned) {
  constexpr int kPack = kChunkBytes / sizeof(T);
  const int column = chunk * kPack;
  if (aligned) return column < d ? load_chunk(g_row + column) : uint4{};
  Pack<T, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    pack.value[e] = column + e < d ? g_row[column + e] : from_float<T>(0.0f);
  }
  return load_chunk(&pack);
}

// The rows of k or of v of a key head: those of its cache, and those that are appended.
template <typename T>
struct KeyRows {
  const T* g_cache;
  int64_t stride;
  const T* g_new;
  int64_t new_stride;
};

template <typename T>
__device__ KeyRows<T> key_rows(const TensorRef& cache, const TensorRef& rows, int64_t b,
                               int64_t h) {
  const T* g_new = rows.data == nullptr ? nullptr : row_at<const T>(rows, b, h, 0);
  return KeyRows<T>{row_at<const T>(cache, b, h, 0), cache.stride[2], g_new, rows.stride[2]};
}

// The n keys of a run: the first `cached` of them in the slots from `slot` on, 0 following the last
// one of a ring; key i of the others is new row i + new_row.
struct RunKeys {
  int n, cached;
  int64_t slot, capacity, new_row;
};

__device__ RunKeys run_keys(const DecodeAttention& p, const Visible& v, int64_t first, int n) {
  const int64_t capacity = p.k_cache.size[2];
  const int cached = p.k_new.data == nullptr ? n : clamp(v.length - first, 0, n);
  return RunKeys{n, cached, p.ring ? first % capacity : first, capacity, first - v.length};
}

// A warp asks for its tiles of k and of v that begin at key `first`; keys beyond the run are
// zeros. It waits where rows are not aligned, which changes no bit.
template <typename Tile, typename T>
__device__ void copy_tiles(uint4* s_k, uint4* s_v, const RunKeys& keys, const KeyRows<T>& k,
                           const KeyRows<T>& v, int first, int d, bool aligned) {
  constexpr int kPack = kChunkBytes / sizeof(T);
  int64_t slot = keys.slot + first;
  if (slot >= keys.capacity) slot -= keys.capacity;
  if (aligned && first + Tile::kKeys <= min(keys.n, keys.cached) &&
      slot + Tile::kKeys <= keys.capacity) {
    // Rows one after the other, as nearly all are: a third of the instructions.
    static_assert(Tile::kKeys * Tile::kChunks % kWarp == 0, "lanes take as many chunks each");
    const T *g_k = k.g_cache + slot * k.stride, *g_v = v.g_cache + slot * v.stride;
#pragma unroll
    for (int i = 0; i < Tile::kKeys * Tile::kChunks / kWarp; ++i) {
      const int c = i * kWarp + threadIdx.x % kWarp, key = c / Tile::kChunks;
      const int chunk = c % Tile::kChunks, to = swizzled<Tile::kChunks>(key, chunk);
      const int bytes = chunk * kPack < d ? kChunkBytes : 0, column = bytes > 0 ? chunk * kPack : 0;
      copy_chunk_async(s_k + to, g_k + key * k.stride + column, bytes);
      copy_chunk_async(s_v + to, g_v + key * v.stride + column, bytes);
    }
    return;
  }
#pragma unroll 1
  for (int c = threadIdx.x % kWarp; c < Tile::kKeys * Tile::kChunks; c += kWarp) {
    const int key = c / Tile::kChunks, chunk = c % Tile::kChunks, i = first + key;
    const bool there = i < keys.n && chunk * kPack < d, cached = i < keys.cached;
    int64_t at = cached ? keys.slot + i : keys.new_row + i;
    if (cached && at >= keys.capacity) at -= keys.capacity;
    const auto copy = [&](uint4* s_tile, const KeyRows<T>& rows) {
      uint4* s_to = s_tile + swizzled<Tile::kChunks>(key, chunk);
      const T* g_row = cached ? rows.g_cache + at * rows.stride : rows.g_new + at * rows.new_stride;
      if (aligned) {
        const T* g_from = there ? g_row + chunk * kPack : rows.g_cache;
        copy_chunk_async(s_to, g_from, there ? kChunkBytes : 0);
      } else {
        store_chunk(s_to, there ? load_row_chunk(g_row, chunk, d, false) : uint4{});
      }
    };
    copy(s_k, k);
    copy(s_v, v);
  }
}

// Block `index` of the `blocks` of a key head copies every blocks'th new row to its slot.
template <typename T>
__device__ void append(const DecodeAttention& p, const TensorRef& cache, const TensorRef& rows,
                       int64_t b, int64_t h, int64_t length, int index, int blocks) {
  for (int64_t i = index; i < rows.size[2]; i += blocks) {
    const int64_t slot = slot_of(p, length + i);
    if (slot < 0) continue;
    const T* g_from = row_at<const T>(rows, b, h, i);
    T* g_to = row_at<T>(cache, b, h, slot);
    for (int c = threadIdx.x; c < cache.size[3]; c += blockDim.x) g_to[c] = g_from[c];
  }
}

// Adds four columns of a partial result, and its sum: state is its maximum and its sum, top the
// maximum over all of them.
__device__ void add_weighted(const float* o, const float* state, float top, float (&r_o)[4],
                             float& sum) {
  const float weight = exp2_approx(state[0] - centered(top));
  float r_part[4];
  load<4>(o, r_part);
  sum = fmaf(weight, state[1], sum);
#pragma unroll
  for (int e = 0; e < 4; ++e) r_o[e] = fmaf(weight, r_part[e], r_o[e]);
}

// Four columns of a row of the result, o / sum, and with the first of them its lse. A query that
// saw no key gives 0 and -inf.
template <typename T>
__device__ void write_columns(const DecodeAttention& p, const DecodePlan& plan, int unit, int row,
                              int column, const float (&r_o)[4], float top, float sum) {
  const int64_t b = unit / plan.hk, h = unit % plan.hk * plan.group + row % plan.group;
  const int i = row / plan.group;
  const bool empty = sum == 0.0f;
  T* g_out = row_at<T>(p.out, b, h, i);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < p.q.size[3]) {
      g_out[column + e] = from_float<T>(empty ? 0.0f : r_o[e] / sum);
    }
  }
  if (column > 0) return;
  float* g_lse = static_cast<float*>(p.lse.data) + (b * p.q.size[1] + h) * plan.t + i;
  *g_lse = empty ? -INFINITY : (top + log2f(sum)) * kLn2;
}

// Where a block leaves the result of a split: partial results (key heads, splits, group * t), each
// kD columns of o, and the maxima and sums; or, with one split, the output itself.
struct SplitResult {
  float* g_partial;
  float* g_state;
};

// Merges what pairs of warps found, four columns to a thread at once.
template <typename T, int kD, int kRows>
__device__ void merge_warps(const DecodeAttention& p, const DecodePlan& plan, int unit, int split,
                            int row0, const float* s_results, const float* s_states,
                            const SplitResult& to) {
  constexpr int kStep = WarpResult<kD>::kStep;
  const int rows = plan.group * plan.t;
  for (int at = threadIdx.x; at < kRows * (kD / 4); at += blockDim.x) {
    const int row = at / (kD / 4), column = at % (kD / 4) * 4;
    if (row0 + row >= rows) return;
    float top = -INFINITY, sum = 0.0f, r_o[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps<kD> / 2; ++w) top = fmaxf(top, s_states[2 * (w * kRows + row)]);
#pragma unroll
    for (int w = 0; w < kWarps<kD> / 2; ++w) {
      const float* s_state = s_states + 2 * (w * kRows + row);
      add_weighted(s_results + (w * kRows + row) * kStep + column, s_state, top, r_o, sum);
    }
    if (plan.splits == 1) {
      write_columns<T>(p, plan, unit, row0 + row, column, r_o, top, sum);
      continue;
    }
    const int64_t state = (int64_t{unit} * plan.splits + split) * rows + row0 + row;
    store<4>(to.g_partial + state * kD + column, r_o);
    if (column == 0) {
      to.g_state[2 * state] = top;
      to.g_state[2 * state + 1] = sum;
    }
  }
}

template <typename T, int kD, int kRows>
__global__ void __launch_bounds__(kWarps<kD>* kWarp, 2)
    decode_attention_kernel(DecodeAttention p, DecodePlan plan, SplitResult to) {
  using Shape = Layout<T, kD, kRows>;
  using Tile = typename Shape::Tile;
  FASTGPT_DYNAMIC_SHARED(shared);
  const int d = static_cast<int>(p.q.size[3]), rows = plan.group * plan.t;
  const int block = static_cast<int>(blockIdx.x);
  const int row_block = block % plan.row_blocks;  // fastest: they read the same keys
  const int run = block / plan.row_blocks % plan.runs;
  const int unit = block / plan.row_blocks / plan.runs;
  const int b = unit / plan.hk, head = unit % plan.hk;
  const Visible v = visible_keys(p, plan, b, row_block);
  const int first_split = run * plan.run;
  const int64_t first = v.begin + first_split * static_cast<int64_t>(plan.split_keys);
  const int n = clamp(v.end - first, 0, plan.run * int64_t{plan.split_keys});

  if (n > 0 || run == 0) {
    uint4* s_tiles = reinterpret_cast<uint4*>(shared);
    uint4* s_q = s_tiles + kStages * Shape::kStageChunks;
    float* s_results = reinterpret_cast<float*>(s_q + Shape::kQueryChunks);
    constexpr int kHalf = kWarps<kD> / 2, kResult = kRows * WarpResult<kD>::kStep;
    float* s_states = s_results + kHalf * kResult;
    int* s_bounds = reinterpret_cast<int*>(s_states + kHalf * 2 * kRows);
    const int warp = threadIdx.x / kWarp;
    const RunKeys keys = run_keys(p, v, first, n);
    const KeyRows<T> k_rows = key_rows<T>(p.k_cache, p.k_new, b, head);
    const KeyRows<T> v_rows = key_rows<T>(p.v_cache, p.v_new, b, head);
    constexpr int kStep = kWarps<kD> * Tile::kKeys;
    static_assert(kFewestKeys % kStep == 0, "a warp's tiles go on from split to split");
    const auto tile_of = [&](int stage) {
      return s_tiles + stage * Shape::kStageChunks + warp * 2 * Shape::kTileChunks;
    };
    const auto ask = [&](int stage, int key) {
      uint4* s_k = tile_of(stage);
      if (key < n) {
        copy_tiles<Tile>(s_k, s_k + Shape::kTileChunks, keys, k_rows, v_rows, key, d, plan.aligned);
      }
      commit_copies();
    };
    ask(0, warp * Tile::kKeys);
    ask(1, warp * Tile::kKeys + kStep);

    const int row0 = row_block * kRows;
    for (int at = threadIdx.x; at < Shape::kQueryChunks; at += blockDim.x) {
      const int row = at / Tile::kChunks, chunk = at % Tile::kChunks;
      uint4 r_q{};
      if (row0 + row < rows) {
        const int i = (row0 + row) / plan.group, h = (row0 + row) % plan.group;
        const T* g_q = row_at<const T>(p.q, b, head * plan.group + h, i);
        r_q = load_row_chunk(g_q, chunk, d, plan.aligned);
      }
      store_chunk(s_q + swizzled<Tile::kChunks>(row, chunk), r_q);
    }
    if (threadIdx.x < kRows) {
      const int64_t own = v.query + (row0 + static_cast<int>(threadIdx.x)) / plan.group - first;
      s_bounds[threadIdx.x] = plan.window > 0 ? clamp(own + 1 - plan.window, 0, n) : 0;
      s_bounds[kRows + threadIdx.x] = clamp(own + 1, 0, n);
    }
    __syncthreads();
    int stage = 0, key = warp * Tile::kKeys, split = first_split, begin = 0;
    do {
      const int end = min(begin + plan.split_keys, n);
      Tile tile(s_bounds, p.scale * kLog2E);
      for (; key < end; key += kStep) {
        wait_copies<1>();
        __syncwarp();  // the copies of the other lanes
        tile.absorb(s_q, tile_of(stage), tile_of(stage) + Shape::kTileChunks, key);
        __syncwarp();  // all have read the tile that the next one overwrites
        ask(stage, key + 2 * kStep);
        stage ^= 1;
      }
      const WarpResult<kD> of_pair{s_results + warp % kHalf * kResult,
                                   s_states + warp % kHalf * 2 * kRows};
      if (begin > 0) __syncthreads();  // the results of the last split have been read
      if (warp >= kHalf) tile.save(of_pair);
      __syncthreads();
      if (warp < kHalf) {
        tile.add(of_pair);
        __syncwarp();  // all have read what they overwrite
        tile.save(of_pair);
      }
      __syncthreads();
      merge_warps<T, kD, kRows>(p, plan, unit, split, row0, s_results, s_states, to);
      ++split;
      begin += plan.split_keys;
    } while (begin < n);
    wait_copies<0>();
  }
  if (p.k_new.data != nullptr) {
    const int index = run * plan.row_blocks + row_block, blocks = plan.runs * plan.row_blocks;
    append<T>(p, p.k_cache, p.k_new, b, head, v.length, index, blocks);
    append<T>(p, p.v_cache, p.v_new, b, head, v.length, index, blocks);
  }
}

// o = sum_n o_n 2^(top_n - top), and the sum likewise: a row to a block, four columns to a thread,
// kMergeSplits splits at once.
template <typename T, int kD>
__global__ void __launch_bounds__(kMergeSplits* kD / 4)
    decode_attention_merge_kernel(DecodeAttention p, DecodePlan plan, SplitResult from) {
  static_assert(kMostSplits <= kMergeSplits * kD / 4, "a thread looks at one maximum");
  FASTGPT_SHARED(float, s_maxima, kWarp);
  FASTGPT_SHARED(float, s_o, (kMergeSplits * kD));
  FASTGPT_SHARED(float, s_sum, kMergeSplits);
  const int rows = plan.group * plan.t, block = static_cast<int>(blockIdx.x);
  const int unit = block / rows, row = block % rows;
  const Visible v = visible_keys(p, plan, unit / plan.hk, row / plan.rows);
  const int filled =
      max(clamp((v.end - v.begin + plan.split_keys - 1) / plan.split_keys, 0, plan.splits), 1);
  const int64_t first = int64_t{unit} * plan.splits * rows + row;
  const int thread = threadIdx.x;
  const float own =
      thread < filled ? from.g_state[2 * (first + int64_t{thread} * rows)] : -INFINITY;
  const float top = block_max(own, s_maxima);

  const int column = thread % (kD / 4) * 4, slice = thread / (kD / 4);
  float sum = 0.0f, r_o[4] = {};
#pragma unroll 4
  for (int split = slice; split < filled; split += kMergeSplits) {
    const int64_t state = first + int64_t{split} * rows;
    add_weighted(from.g_partial + state * kD + column, from.g_state + 2 * state, top, r_o, sum);
  }
  store_floats(s_o + slice * kD + column, r_o);
  if (column == 0) s_sum[slice] = sum;
  __syncthreads();
  if (slice > 0) return;
#pragma unroll
  for (int other = 1; other < kMergeSplits; ++other) {
    float r_part[4];
    load<4>(s_o + other * kD + column, r_part);
    sum += s_sum[other];
#pragma unroll
    for (int e = 0; e < 4; ++e) r_o[e] += r_part[e];
  }
  write_columns<T>(p, plan, unit, row, column, r_o, top, sum);
}

// f(Constant<kD>): the columns that the kernel for head_dim d works on.
template <typename F>
void visit_head_dim(int64_t d, const F& f) {
  check_at_most(d, 256, "head_dim");
  if (d <= 64) return f(Constant<64>{});
  if (d <= 80) return f(Constant<80>{});
  if (d <= 96) return f(Constant<96>{});
  if (d <= 128) return f(Constant<128>{});
  f(Constant<256>{});
}

// f(Constant<kD>, plan, number of partial results).
template <typename F>
void with_plan(const DecodeAttention& p, const F& f) {
  visit_head_dim(p.q.size[3], [&](auto columns) {
    const DecodePlan plan = plan_decode(p, decltype(columns)::kValue);
    const int64_t rows = p.q.size[0] * p.q.size[1] * p.q.size[2];
    f(columns, plan, plan.splits == 1 ? 0 : rows * plan.splits);
  });
}

}  // namespace

int64_t decode_attention_workspace(const DecodeAttention& p) {
  int64_t floats = 0;
  with_plan(p, [&](auto columns, const DecodePlan&, int64_t partials) {
    floats = partials * (decltype(columns)::kValue + 2);
  });
  return floats;
}

void decode_attention(const DecodeAttention& p, float* workspace, void* stream) {
  with_plan(p, [&](auto columns, DecodePlan plan, int64_t partials) {
    constexpr int kD = decltype(columns)::kValue;
    const int64_t units = p.q.size[0] * p.k_cache.size[1];
    const SplitResult result{workspace, workspace + partials * kD};
    visit_dtype<__nv_bfloat16, __half>(p.q.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr bool kWide = std::is_same_v<T, float>;
      visit_bool(plan.rows == (kWide ? 1 : 8), [&](auto few) {
        constexpr int kRows = decltype(few)::kValue ? (kWide ? 1 : 8) : (kWide ? 8 : 16);
        constexpr int kBytes = Layout<T, kD, kRows>::kBytes;
        choose_run(plan, units, kBytes);
        launch(decode_attention_kernel<T, kD, kRows>,
               dim3(grid_size(units * plan.runs * plan.row_blocks)), dim3(kWarps<kD> * kWarp),
               kBytes, stream, p, plan, result);
      });
      if (plan.splits == 1) return;
      launch(decode_attention_merge_kernel<T, kD>,
             dim3(grid_size(p.q.size[0] * p.q.size[1] * p.q.size[2])), dim3(kMergeSplits * kD / 4),
             0, stream, p, plan, result);
    });
  });
}

}  // namespace fastgpt::cuda

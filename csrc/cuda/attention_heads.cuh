// What the attention kernels know before they meet a tile: which rows a head has, which tiles of
// them a block visits, and what changes a score. Rows are queries and columns are keys; query i
// stands at position i + offset. Scores are in units of log2(e).
#pragma once

#include "csrc/common/math.h"
#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/launch.cuh"
#include "csrc/ops/attention.h"

namespace fastgpt::cuda {

// What a size, an offset and a window may be at most: sums of them are still ints, and so large a
// window hides nothing.
constexpr int kMostRows = 1 << 28;
constexpr int kWholeWindow = 1 << 30;

// Dense or packed attention, as the kernels take it.
struct AttentionProblem {
  AttentionInputs in;             // of packed documents: (1, h, t, d)
  const int32_t* g_cu_seqlens_q;  // of packed documents, else nullptr
  const int32_t* g_cu_seqlens_k;
  int b, h, hk, d;  // packed: b documents
  int sq, sk;       // packed: of the longest
  int offset, window;
};

static inline AttentionProblem problem_of(const AttentionInputs& in) {
  for (const int64_t size : {in.q.size[0], in.q.size[1], in.q.size[2], in.k.size[2]}) {
    check_at_most(size, kMostRows, "size of an attention tensor");
  }
  AttentionProblem p{in, nullptr, nullptr, 0, 0, 0, 0, 0, 0, 0, 0};
  p.b = static_cast<int>(in.q.size[0]);
  p.h = static_cast<int>(in.q.size[1]);
  p.hk = static_cast<int>(in.k.size[1]);
  p.d = static_cast<int>(in.q.size[3]);
  p.sq = static_cast<int>(in.q.size[2]);
  p.sk = static_cast<int>(in.k.size[2]);
  check_at_most(in.query_offset < 0 ? -in.query_offset : in.query_offset, kMostRows,
                "query_offset");
  p.offset = static_cast<int>(in.query_offset);
  p.window = static_cast<int>(in.window < kWholeWindow ? in.window : kWholeWindow);
  return p;
}

// Elements of the batch, and one more for the tokens that no document has.
static inline int64_t elements_of(const AttentionProblem& p) {
  return p.b + (p.g_cu_seqlens_q != nullptr ? 1 : 0);
}

// attention_fwd.cu
void run_attention_fwd(const AttentionProblem& problem, const TensorRef& out,
                       const TensorRef& out_lo, const TensorRef& lse, void* stream);

// ---- which rows, which block ----

struct Sequence {
  int first, count;  // its rows within the tensor
};

// Of packed documents the z-th, or (z == b) what follows the last; of a batch, all s rows. Whatever
// the offsets hold, no row outside of the tensor is met.
__device__ inline Sequence sequence_of(const int32_t* g_cu_seqlens, int z, int b, int64_t tokens,
                                       int s) {
  if (g_cu_seqlens == nullptr) return {0, s};
  const int total = static_cast<int>(tokens);
  const int first = min(max(g_cu_seqlens[z], 0), total);
  const int end = z < b ? min(max(g_cu_seqlens[z + 1], first), total) : total;
  return {first, end - first};
}

// Row `first` of a head of a (b, h, s, d) tensor, or of packed documents in one of (1, h, t, d).
template <typename T>
__device__ inline T* rows_of(const TensorRef& t, bool packed, int z, int head, int first) {
  return static_cast<T*>(t.data) + (packed ? 0 : z * t.stride[0]) + head * t.stride[1] +
         first * t.stride[2];
}

// The first of a head's values in a contiguous (b, h, s) tensor, packed in one of (h, t).
__device__ inline int64_t statistics_at(const AttentionProblem& p, int z, int head, int first) {
  const bool packed = p.g_cu_seqlens_q != nullptr;
  return (packed ? head : z * static_cast<int64_t>(p.h) + head) * p.in.q.size[2] + first;
}

struct Place {
  int tile, y;  // y: z * heads + head
};

// Blocks start in order. First come the first tiles of as many heads as the L2 cache holds, then
// their second tiles; in a band neighbouring tiles of one head share what they read.
__device__ inline Place place_of(int tiles, int heads, int length, int d, bool windowed) {
  constexpr int kElementsTogether = 1 << 22;  // 16 MiB of two tensors of 16 bits
  const int block = static_cast<int>(blockIdx.x);
  if (windowed) return {block % tiles, block / tiles};
  const int most = min(max(kElementsTogether / d / max(length, 1), 1), heads);
  const int first = block / (most * tiles) * most;
  const int together = min(most, heads - first), inside = block - first * tiles;
  return {inside / together, first + inside % together};
}

// The block's queries: those from m0 on of one head. Under a causal mask the last ones, which see
// the most keys, start first.
struct QueryBlock {
  int tiles, z, head, key_head, m0;
  Sequence queries;

  __device__ QueryBlock(const AttentionProblem& p, int rows) {
    tiles = (p.sq + rows - 1) / rows;
    const Place place =
        place_of(tiles, static_cast<int>(gridDim.x) / tiles, p.sk, p.d, p.window > 0);
    z = place.y / p.h;
    head = place.y % p.h;
    key_head = head / (p.h / p.hk);
    m0 = (p.in.causal ? tiles - 1 - place.tile : place.tile) * rows;
    queries = sequence_of(p.g_cu_seqlens_q, z, p.b, p.in.q.size[2], p.sq);
  }
};

// ---- the band ----

// How to visit the tiles that hold some of [low, high): those with elements outside of
// [full_low, full_high) first, at the low end and then at the high end.
struct Walk {
  int edges, left, first, second, count, full;

  __device__ Walk(int low, int full_low, int full_high, int high, int elements, int tile,
                  bool selective) {
    const auto up = [tile](int x) { return (x + tile - 1) / tile; };
    const int start = max(low, 0) / tile;
    high = max(min(high, elements), 0);
    full_high = max(min(full_high, elements), 0);
    count = max(up(high) - start, 0);
    left = min(max(up(max(full_low, 0)) - start, 0), count);
    int fulls = max(full_high / tile - start - left, 0);
    if (selective) {
      left = count;
      fulls = 0;
    }
    edges = count - fulls;
    first = start * tile;
    second = first + fulls * tile;
    full = first + left * tile;
    tile_ = tile;
  }
  __device__ bool edge(int i) const { return i < edges; }
  __device__ int at(int i) const {
    return (i < left ? first : i < edges ? second : full - edges * tile_) + i * tile_;
  }

 private:
  int tile_;
};

// Key j is visible to the query at position i' iff (j <= i' when causal) and |i' - j| < window.
struct Band {
  int offset, window, sk;
  bool causal;

  __device__ Band(const AttentionProblem& p, int queries, int keys)
      : offset(p.g_cu_seqlens_q == nullptr ? p.offset : keys - queries),
        window(p.window),
        sk(keys),
        causal(p.in.causal) {}
  // The first and the last key that a query sees.
  __device__ int low(int row) const { return window > 0 ? row + offset - window + 1 : 0; }
  __device__ int high(int row) const {
    const int at = row + offset;
    return min(causal ? at : window > 0 ? at + window - 1 : sk - 1, sk - 1);
  }
  __device__ bool sees(int row, int column) const {
    return column <= high(row) && column >= low(row);
  }
  // The first and the last query that sees a key; of a key that is not there, the first is beyond
  // all queries.
  __device__ int first_row(int column) const {
    if (column >= sk) return kMostRows;
    return causal ? column - offset : window > 0 ? column - offset - window + 1 : 0;
  }
  __device__ int last_row(int column) const {
    return window > 0 ? column - offset + window - 1 : kMostRows - 1;
  }
  __device__ bool sees_any(int row) const { return max(low(row), 0) <= high(row); }

  // The tiles of keys that the rows m0 to m1 - 1 see.
  __device__ Walk keys(int m0, int m1, int tile, bool selective) const {
    const int first = m0 + offset, end = m1 + offset;
    const bool open = !causal && window == 0;
    return Walk(window > 0 ? first - window + 1 : 0, window > 0 ? end - window : 0,
                open     ? sk
                : causal ? first + 1
                         : first + window,
                open     ? sk
                : causal ? end
                         : end + window - 1,
                sk, tile, selective);
  }
  // The tiles of queries that see the keys n0 to n1 - 1.
  __device__ Walk queries(int n0, int n1, int sq, int tile, bool selective) const {
    const int first = n0 - offset, end = n1 - offset;
    const bool open = !causal && window == 0;
    return Walk(open     ? 0
                : causal ? first
                         : first - window + 1,
                open     ? 0
                : causal ? end - 1
                         : end - window,
                window > 0 ? first + window : sq, window > 0 ? end + window - 1 : sq, sq, tile,
                selective);
  }
};

// ---- what changes a score ----

// Scores that need no more than the scale and the band take the kernels without features.
static inline bool has_features(const AttentionInputs& in) {
  return in.key_padding_mask || in.bias || in.mask || in.alibi_slopes || in.dropout_seed ||
         !(in.scale > 0.0f);
}

static inline bool has_dropout(const AttentionInputs& in) {
  return in.dropout_seed && in.dropout_p > 0.0;
}

__device__ inline int64_t broadcast_stride(const TensorRef& t, int i) {
  return t.size[i] == 1 ? 0 : t.stride[i];
}

struct Features {
  const uint8_t* g_padding = nullptr;
  const uint8_t* g_mask = nullptr;
  const void* g_bias = nullptr;
  int64_t padding_s = 0, mask_q = 0, mask_k = 0, bias_q = 0, bias_k = 0;
  DType bias_dtype = DType::f32;
  float slope = 0.0f;
  bool dropout = false;
  uint32_t seed_low = 0, seed_high = 0, y = 0;
  uint64_t threshold = 0;

  Features() = default;
  __device__ Features(const AttentionInputs& in, int z, int h, int head) {
    if (in.key_padding_mask.data != nullptr) {
      padding_s = in.key_padding_mask.stride[1];
      g_padding =
          static_cast<const uint8_t*>(in.key_padding_mask.data) + z * in.key_padding_mask.stride[0];
    }
    if (in.mask.data != nullptr) {
      mask_q = broadcast_stride(in.mask, 2);
      mask_k = broadcast_stride(in.mask, 3);
      g_mask = static_cast<const uint8_t*>(in.mask.data) + z * broadcast_stride(in.mask, 0) +
               head * broadcast_stride(in.mask, 1);
    }
    if (in.bias.data != nullptr) {
      bias_dtype = in.bias.dtype;
      bias_q = broadcast_stride(in.bias, 2);
      bias_k = broadcast_stride(in.bias, 3);
      const int64_t at = z * broadcast_stride(in.bias, 0) + head * broadcast_stride(in.bias, 1);
      g_bias = static_cast<const char*>(in.bias.data) + at * (bias_dtype == DType::f32 ? 4 : 2);
    }
    if (in.alibi_slopes.data != nullptr) {
      const TensorRef& slopes = in.alibi_slopes;
      const int64_t at = slopes.ndim == 1 ? head * slopes.stride[0]
                                          : z * slopes.stride[0] + head * slopes.stride[1];
      slope = static_cast<const float*>(slopes.data)[at] * kLog2E;
    }
    if (in.dropout_seed.data != nullptr && in.dropout_p > 0.0) {
      dropout = true;
      const uint64_t seed = *static_cast<const uint64_t*>(in.dropout_seed.data);
      seed_low = static_cast<uint32_t>(seed);
      seed_high = static_cast<uint32_t>(seed >> 32);
      threshold = dropout_threshold(in.dropout_p);
      y = static_cast<uint32_t>(z * h + head);
    }
  }

  // More than the band may hide keys: no tile is without a mask.
  __device__ bool selective() const { return g_padding || g_mask || g_bias; }

  __device__ bool pads(int column) const {
    return g_padding != nullptr && g_padding[column * padding_s] == 0;
  }
  // `scaled` with bias, -inf where the mask hides it. Row and column are within the head.
  __device__ float score(float scaled, int row, int column, int offset) const {
    float t = scaled - fabsf(static_cast<float>(row + offset - column)) * slope;
    if (g_bias != nullptr) {
      const int64_t at = row * bias_q + column * bias_k;
      const float bias = bias_dtype == DType::f32 ? static_cast<const float*>(g_bias)[at]
                         : bias_dtype == DType::bf16
                             ? to_float(static_cast<const __nv_bfloat16*>(g_bias)[at])
                             : to_float(static_cast<const __half*>(g_bias)[at]);
      t += bias_log2(bias);
    }
    if (g_mask != nullptr && g_mask[row * mask_q + column * mask_k] == 0) t = -INFINITY;
    return t;
  }
  // A random word has the counter (column / 4, row, y, 0) and the lane column % 4.
  __device__ Philox4 words(int row, int column) const {
    return philox_4x32(static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), y, 0,
                       seed_low, seed_high);
  }
  // Makes zero what dropout drops of the probabilities in columns `column`, which is even, and
  // `column + 1`.
  __device__ void drop(int row, int column, float& first, float& second) const {
    const Philox4 random = words(row, column);
    const bool later = column % 4 != 0;
    if ((later ? random.word[2] : random.word[0]) < threshold) first = 0.0f;
    if ((later ? random.word[3] : random.word[1]) < threshold) second = 0.0f;
  }
  __device__ bool keeps(int row, int column) const {
    const Philox4 random = words(row, column);
    const uint32_t low = column % 2 == 0 ? random.word[0] : random.word[1];
    const uint32_t high = column % 2 == 0 ? random.word[2] : random.word[3];
    return (column % 4 < 2 ? low : high) >= threshold;
  }
};

// What a probability that dropout keeps is multiplied by.
static inline float dropout_rescale(const AttentionInputs& in) {
  return has_dropout(in) ? static_cast<float>(1.0 / (1.0 - in.dropout_p)) : 1.0f;
}

}  // namespace fastgpt::cuda

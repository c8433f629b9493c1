// The t newest queries of each sequence over its cache, after appending the new keys in place:
// query i stands at position total - t + i, position p lives in slot p (mod capacity in a ring).
//
// Plan: up to 8 queries split the keys (split_attention.cpp), by the capacity alone; longer chunks
// take the tiles of dense attention. Bytes: the visible k and v once, which bounds the speed.
// Flops: 4 t d a visible key and query head.
#include "csrc/cpu/attention_dense.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/split_attention.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

int64_t count_at(const TensorRef& counts, int64_t b) {
  if (counts.dtype == DType::i64) return static_cast<const int64_t*>(counts.data)[b];
  return static_cast<const int32_t*>(counts.data)[b];
}

int64_t appended(const DecodeAttention& p) {
  return p.k_new ? p.k_new.size[2] : 0;
}

ContentError check(const DecodeAttention& p) {
  for (int64_t b = 0; b < p.q.size[0]; ++b) {
    const int64_t length = count_at(p.cache_lengths, b);
    if (length < 0) return ContentError{"cache_lengths", "at least 0", b, length};
    if (!p.ring && length + appended(p) > p.k_cache.size[2]) {
      return ContentError{"cache_lengths",
                          "at most the capacity of the cache less the appended keys", b, length};
    }
  }
  return ContentError{};
}

void append(const TensorRef& cache, const TensorRef& rows, int64_t b, int64_t h, int64_t at,
            bool ring) {
  const Rows from = head_rows(rows, b, h);
  Rows to = head_rows(cache, b, h);
  to.ring = ring ? cache.size[2] : 0;
  const size_t bytes = cache.size[3] * element_size(cache.dtype);
  for (int64_t i = 0; i < rows.size[2]; ++i) {
    std::memcpy(row_at(to, cache.dtype, at + i), row_at(from, cache.dtype, i), bytes);
  }
}

Head cache_head(const DecodeAttention& p, int64_t b, int64_t h) {
  const int64_t group = p.q.size[1] / p.k_cache.size[1];
  Head head;
  head.dtype = head.kv_dtype = p.q.dtype;
  head.d = static_cast<int>(p.q.size[3]);
  head.sq = p.q.size[2];
  head.sk = count_at(p.cache_lengths, b) + appended(p);
  head.offset = head.sk - head.sq;
  const int64_t start = p.cache_start ? count_at(p.cache_start, b) : 0;
  head.first_key = clamp(start, 0, head.sk);
  head.causal = true;
  head.window = effective_window(p.window, head.sq, head.sk, head.offset);
  head.scale = p.scale;
  head.q = head_rows(p.q, b, h);
  head.k = head_rows(p.k_cache, b, h / group);
  head.v = head_rows(p.v_cache, b, h / group);
  head.k.ring = head.v.ring = p.ring ? p.k_cache.size[2] : 0;
  return head;
}

}  // namespace

ContentError decode_attention_kernel(const DecodeAttention& p) {
  const ContentError e = check(p);
  if (e.argument != nullptr) return e;
  const int64_t b = p.q.size[0], h = p.q.size[1], t = p.q.size[2], hk = p.k_cache.size[1];
  const int64_t capacity = p.k_cache.size[2], group = h / hk;
  const int d = static_cast<int>(p.q.size[3]);
  if (p.k_new) {
    parallel_for(b * hk, 16, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t at = count_at(p.cache_lengths, unit / hk);
        append(p.k_cache, p.k_new, unit / hk, unit % hk, at, p.ring);
        append(p.v_cache, p.v_new, unit / hk, unit % hk, at, p.ring);
      }
    });
  }
  const auto out_of = [&](int64_t at_b, int64_t at_h) {
    return HeadOut{head_rows(p.out, at_b, at_h), Rows{},
                   static_cast<float*>(p.lse.data) + (at_b * h + at_h) * t};
  };
  if (t <= kSplitQueries) {
    split_attention(
        b * hk, group, t, capacity, d,
        [&](int64_t unit, int64_t g) { return cache_head(p, unit / hk, unit % hk * group + g); },
        [&](int64_t unit, int64_t g) { return out_of(unit / hk, unit % hk * group + g); });
    return e;
  }
  const int in_group = group_tiles(Head{}, b * h * ceil_div(t, kQueryTile));
  const int64_t groups = ceil_div(t, in_group * kQueryTile);
  const int workers = worker_count(b * h * groups);
  const WorkerScratch memory(workers, attend_scratch(d) * sizeof(float));
  parallel_items(b * h * groups, workers, [&](int64_t item, int worker) {
    const int64_t at_b = item / groups / h, at_h = item / groups % h;
    const int64_t q0 = (groups - 1 - item % groups) * in_group * kQueryTile;
    attend_tiles(cache_head(p, at_b, at_h), out_of(at_b, at_h), q0, in_group, memory.of(worker));
  });
  return e;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

// Attention within each of the documents packed into q (tq, h, d) and k, v (tk, hk, d), aligned
// bottom-right document by document; forward and backward run the tiles of dense attention, so a
// document has the bits it would have alone. Rows behind the last document: output and gradients 0.
//
// Plan: a dynamic queue over (document, head, query tiles) forward, the plans of attention_bwd.h
// over (document, key head) backward. Flops and bytes: those of dense attention, summed.
#include "csrc/common/math.h"
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/attention_dense.h"
#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/kernels.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

ContentError check_offsets(const TensorRef& offsets, const char* name, int64_t total,
                           int64_t longest, const char* wrong_end, const char* too_long) {
  const int32_t* at = static_cast<const int32_t*>(offsets.data);
  const int64_t documents = offsets.size[0] - 1;
  if (at[0] != 0) return ContentError{name, "0", 0, at[0]};
  for (int64_t i = 1; i <= documents; ++i) {
    if (at[i] < at[i - 1]) {
      return ContentError{name, "an offset not below the one before it", i, at[i]};
    }
    if (at[i] - at[i - 1] > longest) return ContentError{name, too_long, i, at[i]};
  }
  if (at[documents] > total) return ContentError{name, wrong_end, documents, at[documents]};
  return ContentError{};
}

ContentError check(const VarlenAttentionInputs& in) {
  const ContentError e = check_offsets(in.cu_seqlens_q, "cu_seqlens_q", in.q.size[0],
                                       in.max_seqlen_q, "at most the number of rows of q",
                                       "an offset at most max_seqlen_q past the last one");
  if (e.argument != nullptr) return e;
  return check_offsets(in.cu_seqlens_k, "cu_seqlens_k", in.k.size[0], in.max_seqlen_k,
                       "at most the number of rows of k",
                       "an offset at most max_seqlen_k past the last one");
}

// Rows of head h of a (t, h, d) tensor from row `first`; null if the tensor is absent.
Rows packed_rows(const TensorRef& t, int64_t first, int64_t h) {
  if (!t) return Rows{};
  const int64_t at = first * t.stride[0] + h * t.stride[1];
  return Rows{static_cast<char*>(t.data) + at * element_size(t.dtype), t.stride[0], 0};
}

// Zeroes the rows of a (t, h, d) tensor from `first` on: those of no document.
void zero_tail(const TensorRef& t, int64_t first) {
  if (!t) return;
  for (int64_t i = first; i < t.size[0]; ++i) {
    for (int64_t h = 0; h < t.size[1]; ++h) {
      std::memset(packed_rows(t, i, h).data, 0, t.size[2] * element_size(t.dtype));
    }
  }
}

struct Documents {
  const VarlenAttentionInputs& in;

  int64_t count() const { return in.cu_seqlens_q.size[0] - 1; }
  int64_t first_query(int64_t i) const {
    return static_cast<const int32_t*>(in.cu_seqlens_q.data)[i];
  }
  int64_t first_key(int64_t i) const {
    return static_cast<const int32_t*>(in.cu_seqlens_k.data)[i];
  }
  int64_t queries(int64_t i) const { return first_query(i + 1) - first_query(i); }
  int64_t keys(int64_t i) const { return first_key(i + 1) - first_key(i); }
  int64_t group() const { return in.q.size[1] / in.k.size[1]; }

  Head head(int64_t i, int64_t h) const {
    Head head;
    head.dtype = head.kv_dtype = in.q.dtype;
    head.d = static_cast<int>(in.q.size[2]);
    head.sq = queries(i);
    head.sk = keys(i);
    head.offset = head.sk - head.sq;
    head.causal = in.causal;
    head.window = effective_window(in.window, head.sq, head.sk, head.offset);
    head.scale = in.scale;
    head.q = packed_rows(in.q, first_query(i), h);
    head.k = packed_rows(in.k, first_key(i), h / group());
    head.v = packed_rows(in.v, first_key(i), h / group());
    return head;
  }
};

struct Packed {
  const VarlenAttentionBwd& p;
  Documents documents;

  int d() const { return static_cast<int>(p.in.q.size[2]); }
  int64_t group() const { return documents.group(); }
  int64_t units() const { return documents.count() * p.in.k.size[1]; }
  int64_t cost(int64_t unit) const {
    const int64_t i = unit / p.in.k.size[1];
    return ceil_div(documents.queries(i), kQueryTile) * ceil_div(documents.keys(i), kKeyTile);
  }
  int64_t longest_keys() const {
    int64_t longest = 0;
    for (int64_t i = 0; i < documents.count(); ++i) {
      longest = documents.keys(i) > longest ? documents.keys(i) : longest;
    }
    return longest;
  }
  GradHead head(int64_t unit, int64_t in_group) const {
    const int64_t i = unit / p.in.k.size[1], hk = unit % p.in.k.size[1];
    const int64_t h = hk * group() + in_group, first = documents.first_query(i);
    GradHead g;
    g.head = documents.head(i, h);
    g.dout = packed_rows(p.dout, first, h);
    g.out = packed_rows(p.out, first, h);
    g.lo = packed_rows(p.out_lo, first, h);
    g.dq = packed_rows(p.dq, first, h);
    const int64_t row = h * p.in.q.size[0] + first;
    g.lse = static_cast<const float*>(p.lse.data) + row;
    g.dlse = p.dlse ? static_cast<const float*>(p.dlse.data) + row : nullptr;
    return g;
  }
  Rows dk(int64_t unit) const { return rows(p.dk, unit); }
  Rows dv(int64_t unit) const { return rows(p.dv, unit); }
  Rows rows(const TensorRef& t, int64_t unit) const {
    return packed_rows(t, documents.first_key(unit / t.size[1]), unit % t.size[1]);
  }
};

}  // namespace

ContentError varlen_attention_fwd_kernel(const VarlenAttentionFwd& p) {
  const ContentError e = check(p.in);
  if (e.argument != nullptr) return e;
  const Documents documents{p.in};
  const int64_t h = p.in.q.size[1];
  const Scratch offsets((documents.count() + 1) * sizeof(int64_t));
  int64_t* first_item = offsets.at<int64_t>();
  int64_t all_tiles = 0;
  for (int64_t i = 0; i < documents.count(); ++i) {
    all_tiles += h * ceil_div(documents.queries(i), kQueryTile);
  }
  const int group = group_tiles(Head{}, all_tiles);
  const int64_t rows = int64_t{group} * kQueryTile;
  first_item[0] = 0;
  for (int64_t i = 0; i < documents.count(); ++i) {
    first_item[i + 1] = first_item[i] + h * ceil_div(documents.queries(i), rows);
  }
  const int64_t items = first_item[documents.count()];
  const int workers = worker_count(items);
  const int d = static_cast<int>(p.in.q.size[2]);
  const WorkerScratch memory(workers, attend_scratch(d) * sizeof(float));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    const int64_t i = owner_of(first_item, documents.count(), item);
    const int64_t groups = (first_item[i + 1] - first_item[i]) / h;
    const int64_t at_h = (item - first_item[i]) / groups,
                  at_group = (item - first_item[i]) % groups;
    const int64_t first = documents.first_query(i);
    const HeadOut to = {packed_rows(p.out, first, at_h), packed_rows(p.out_lo, first, at_h),
                        static_cast<float*>(p.lse.data) + at_h * p.in.q.size[0] + first};
    attend_tiles(documents.head(i, at_h), to, (groups - 1 - at_group) * rows, group,
                 memory.of(worker));
  });
  const int64_t used = documents.first_query(documents.count());
  zero_tail(p.out, used);
  zero_tail(p.out_lo, used);
  for (int64_t at_h = 0; at_h < h; ++at_h) {
    float* lse = static_cast<float*>(p.lse.data) + at_h * p.in.q.size[0];
    for (int64_t i = used; i < p.in.q.size[0]; ++i) lse[i] = -kInfinity;
  }
  return ContentError{};
}

ContentError varlen_attention_bwd_kernel(const VarlenAttentionBwd& p) {
  const ContentError e = check(p.in);
  if (e.argument != nullptr) return e;
  const Documents documents{p.in};
  backward(Packed{p, documents});
  zero_tail(p.dq, documents.first_query(documents.count()));
  zero_tail(p.dk, documents.first_key(documents.count()));
  zero_tail(p.dv, documents.first_key(documents.count()));
  return e;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

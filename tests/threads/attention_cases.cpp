// Attention over (b, h, s, d), packed documents and caches. Tensors with heads are stored
// (b, s, h, d), as the package makes them.
#include "csrc/ops/attention.h"
#include "tests/threads/driver.h"

namespace fastgpt::driver {
namespace {

TensorRef heads_in(Run& run, int64_t b, int64_t h, int64_t s, int64_t d) {
  return exchanged(run.input({b, s, h, d}), 1, 2);
}

TensorRef heads_out(Run& run, const char* name, int64_t b, int64_t h, int64_t s, int64_t d) {
  return exchanged(run.result(name, {b, s, h, d}), 1, 2);
}

// A backward of 8 units, two for each of four threads, keeps them whole; one of 2 splits their
// tiles. Two plans, one thread always takes the first, and the bits have to agree.
struct Dense {
  std::string name;
  int64_t b = 2, h = 4, hk = 4, sq = 110, sk = 110, d = 40;
  bool causal = true;
  int64_t window = 0;
  bool padding = false, masked = false, alibi = false, dlse = false;
  Shape bias;
  double dropout = 0.0;
};

void dense(Run& run, const Dense& c) {
  const int64_t b = c.b, h = c.h, hk = c.hk, sq = c.sq, sk = c.sk, d = c.d;
  AttentionInputs in{};
  in.q = heads_in(run, b, h, sq, d);
  in.k = heads_in(run, b, hk, sk, d);
  in.v = heads_in(run, b, hk, sk, d);
  if (c.padding) in.key_padding_mask = run.mask({b, sk});
  if (!c.bias.empty()) in.bias = run.input(c.bias);
  if (c.masked) in.mask = run.mask({b, 1, sq, sk});
  if (c.alibi) in.alibi_slopes = run.input({h}, DType::f32);
  if (c.dropout > 0.0) in.dropout_seed = run.integers(DType::i64, {0x123456789abcdef});
  in.dropout_p = c.dropout;
  in.scale = 0.2f;
  in.causal = c.causal;
  in.window = c.window;
  in.query_offset = sk - sq;

  // What the rounding of out lost; float32 loses nothing that it could keep.
  const bool low = run.dtype() != DType::f32;
  const TensorRef out = heads_out(run, "attention_fwd: out", b, h, sq, d);
  const TensorRef lse = run.result("attention_fwd: lse", {b, h, sq}, DType::f32);
  const TensorRef out_lo = low ? heads_out(run, "attention_fwd: out_lo", b, h, sq, d) : TensorRef{};
  cpu::attention_fwd({in, out, lse, out_lo});

  AttentionBwd bwd{};
  bwd.in = in;
  bwd.dout = heads_in(run, b, h, sq, d);
  if (c.dlse) bwd.dlse = run.input({b, h, sq}, DType::f32);
  bwd.out = out;
  bwd.lse = lse;
  bwd.out_lo = out_lo;
  bwd.dq = heads_out(run, "attention_bwd: dq", b, h, sq, d);
  bwd.dk = heads_out(run, "attention_bwd: dk", b, hk, sk, d);
  bwd.dv = heads_out(run, "attention_bwd: dv", b, hk, sk, d);
  if (!c.bias.empty()) bwd.dbias = run.result("attention_bwd: dbias", c.bias, DType::f32);
  cpu::attention_bwd(bwd);
}

struct Varlen {
  std::string name;
  int64_t h, hk;
  std::vector<int64_t> queries, keys;  // of each document
  int64_t window = 0;
};

void varlen(Run& run, const Varlen& c) {
  const int64_t d = 40, tail = 3;  // rows of no document
  Shape q_at = {0}, k_at = {0};
  for (size_t i = 0; i < c.queries.size(); ++i) {
    q_at.push_back(q_at.back() + c.queries[i]);
    k_at.push_back(k_at.back() + c.keys[i]);
  }
  const Shape q_shape = {q_at.back() + tail, c.h, d}, k_shape = {k_at.back() + tail, c.hk, d};
  const Shape lse_shape = {c.h, q_shape[0]};
  VarlenAttentionInputs in{};
  in.q = run.input(q_shape);
  in.k = run.input(k_shape);
  in.v = run.input(k_shape);
  in.cu_seqlens_q = run.integers(DType::i32, q_at);
  in.cu_seqlens_k = run.integers(DType::i32, k_at);
  in.max_seqlen_q = q_at.back();
  in.max_seqlen_k = k_at.back();
  in.scale = 0.2f;
  in.causal = true;
  in.window = c.window;

  VarlenAttentionBwd bwd{};
  bwd.in = in;
  bwd.out = run.result("varlen_attention_fwd: out", q_shape);
  bwd.lse = run.result("varlen_attention_fwd: lse", lse_shape, DType::f32);
  if (run.dtype() != DType::f32) {
    bwd.out_lo = run.result("varlen_attention_fwd: out_lo", q_shape);
  }
  run.accept(cpu::varlen_attention_fwd({in, bwd.out, bwd.lse, bwd.out_lo}));
  bwd.dout = run.input(q_shape);
  bwd.dq = run.result("varlen_attention_bwd: dq", q_shape);
  bwd.dk = run.result("varlen_attention_bwd: dk", k_shape);
  bwd.dv = run.result("varlen_attention_bwd: dv", k_shape);
  run.accept(cpu::varlen_attention_bwd(bwd));
}

// A cache of 300 slots is two splits of the keys.
struct Decode {
  std::string name;
  int64_t b = 20, h = 4, hk = 2, t = 1, capacity = 300, d = 24;
  int64_t window = 0;
  bool ring = false, append = true, start = false;
  DType counts = DType::i32;
};

void decode(Run& run, const Decode& c) {
  const int64_t newest = c.append ? c.t : 0, most = c.ring ? 5 * c.capacity : c.capacity - newest;
  Shape lengths, starts;
  for (int64_t i = 0; i < c.b; ++i) {
    lengths.push_back(most - i * 37 % most);
    starts.push_back(lengths.back() / 3);
  }
  DecodeAttention p{};
  p.q = heads_in(run, c.b, c.h, c.t, c.d);
  p.k_cache = run.updated("decode_attention: k_cache", {c.b, c.hk, c.capacity, c.d}, run.dtype());
  p.v_cache = run.updated("decode_attention: v_cache", {c.b, c.hk, c.capacity, c.d}, run.dtype());
  p.cache_lengths = run.integers(c.counts, lengths);
  if (c.append) {
    p.k_new = heads_in(run, c.b, c.hk, c.t, c.d);
    p.v_new = heads_in(run, c.b, c.hk, c.t, c.d);
  }
  if (c.start) p.cache_start = run.integers(c.counts, starts);
  p.out = heads_out(run, "decode_attention: out", c.b, c.h, c.t, c.d);
  p.lse = run.result("decode_attention: lse", {c.b, c.h, c.t}, DType::f32);
  p.scale = 0.2f;
  p.window = c.window;
  p.ring = c.ring;
  run.accept(cpu::decode_attention(p));
}

template <typename T>
T with(const char* name, void (*change)(T&)) {
  T c;
  change(c);
  c.name = name;
  return c;
}

}  // namespace

std::vector<Case> attention_cases() {
  const Dense of_dense[] = {
      with<Dense>("attention, whole units", [](Dense& c) { c.dlse = true; }),
      with<Dense>("attention, split tiles, grouped heads, not causal",
                  [](Dense& c) {
                    c.b = 1, c.hk = 2, c.sk = 150, c.d = 64;
                    c.causal = false;
                  }),
      with<Dense>("attention, window, whole units", [](Dense& c) { c.window = 50; }),
      with<Dense>("attention, window, split tiles",
                  [](Dense& c) { c.b = 1, c.h = c.hk = 2, c.sq = c.sk = 330, c.window = 50; }),
      with<Dense>("attention, few queries, split keys",
                  [](Dense& c) { c.h = 8, c.sq = 5, c.sk = 600; }),
      with<Dense>("attention, key padding", [](Dense& c) { c.padding = true, c.d = 17; }),
      with<Dense>("attention, mask", [](Dense& c) { c.masked = true; }),
      with<Dense>("attention, alibi", [](Dense& c) { c.alibi = true; }),
      with<Dense>("attention, dropout", [](Dense& c) { c.dropout = 0.2; }),
      with<Dense>("attention, bias of every pair",
                  [](Dense& c) { c.b = 1, c.h = 8, c.hk = 2, c.bias = {1, 8, 110, 110}; }),
      with<Dense>("attention, bias of every key", [](Dense& c) { c.bias = {2, 4, 1, 110}; }),
      with<Dense>("attention, everything",
                  [](Dense& c) {
                    c.b = 1, c.hk = 2, c.sk = 150, c.window = 100, c.dropout = 0.1;
                    c.padding = c.masked = c.alibi = c.dlse = true;
                    c.bias = {1, 4, 1, 150};
                  }),
  };
  const Varlen of_varlen[] = {
      {"varlen_attention, whole units", 4, 2, {70, 0, 1, 130, 48}, {90, 5, 1, 130, 64}},
      {"varlen_attention, window, split tiles", 2, 1, {200, 30}, {210, 30}, 80},
  };
  const Decode of_decode[] = {
      with<Decode>("decode_attention, one token", [](Decode&) {}),
      with<Decode>("decode_attention, ring, window",
                   [](Decode& c) { c.t = 3, c.window = 290, c.ring = true; }),
      with<Decode>("decode_attention, no append, cache start",
                   [](Decode& c) {
                     c.append = false, c.start = true, c.t = 5;
                     c.counts = DType::i64;
                   }),
      with<Decode>("decode_attention, long chunk",
                   [](Decode& c) { c.b = 3, c.t = 110, c.window = 90; }),
  };
  std::vector<Case> cases;
  for (const Dense& c : of_dense) cases.push_back({c.name, [c](Run& run) { dense(run, c); }});
  for (const Varlen& c : of_varlen) cases.push_back({c.name, [c](Run& run) { varlen(run, c); }});
  for (const Decode& c : of_decode) cases.push_back({c.name, [c](Run& run) { decode(run, c); }});
  return cases;
}

}  // namespace fastgpt::driver

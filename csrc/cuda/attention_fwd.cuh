// What the forward kernels of attention share: their arguments, the rows that a block works on, and
// how it leaves its results.
#pragma once

#include "csrc/cuda/attention_tile.cuh"

namespace fastgpt::cuda {

struct Fwd {
  AttentionProblem problem;
  TensorRef out, out_lo;
  float* g_lse;
  float scale, rescale;
  bool direct_q, direct_k, direct_v;
};

// A block's queries, m0 on of one head, and the keys of that head. `any` is false where there is
// nothing to compute: what no document has is cleared then.
template <typename T>
struct FwdRows {
  bool any;
  int z, head, m0, first, queries, keys;  // first: of the head's queries within the tensor
  const T *g_q, *g_k, *g_v;

  __device__ FwdRows(const Fwd& p, int count) {
    const AttentionProblem& problem = p.problem;
    const AttentionInputs& in = problem.in;
    const bool packed = problem.g_cu_seqlens_q != nullptr;
    const QueryBlock block(problem, count);
    z = block.z;
    head = block.head;
    m0 = block.m0;
    first = block.queries.first;
    queries = block.queries.count;
    any = z < problem.b && m0 < queries;
    if (z == problem.b) clear(p, block.tiles * count, count);
    if (!any) return;
    const Sequence s = sequence_of(problem.g_cu_seqlens_k, z, problem.b, in.k.size[2], problem.sk);
    keys = s.count;
    g_q = rows_of<const T>(in.q, packed, z, head, first + m0);
    g_k = rows_of<const T>(in.k, packed, z, block.key_head, s.first);
    g_v = rows_of<const T>(in.v, packed, z, block.key_head, s.first);
  }

  // The results of query `row` on; found anew, or they would take registers all the while.
  __device__ T* out_rows(const Fwd& p, const TensorRef& t, int row) const {
    return rows_of<T>(t, p.problem.g_cu_seqlens_q != nullptr, z, head, first + row);
  }
  __device__ float* lse_rows(const Fwd& p, int row) const {
    return p.g_lse + statistics_at(p.problem, z, head, first) + row;
  }

  // A warp's rows of accumulators, normalized, from query m0 + own on. s_own: its rows of a tile.
  template <int kD, int kM>
  __device__ void store(float (&r_out)[kM][kD / 8][4], T* s_own, int own, const Fwd& p) const {
    const int row = m0 + own, d = p.problem.d;
    store_rows<kD>(r_out, 0, s_own, out_rows(p, p.out, row), p.out.stride[2], queries - row, d);
    if (p.out_lo.data == nullptr) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          r_out[m][n][e] -= to_float(from_float<T>(r_out[m][n][e]));
        }
      }
    }
    store_rows<kD>(r_out, 0, s_own, out_rows(p, p.out_lo, row), p.out_lo.stride[2], queries - row,
                   d);
  }

 private:
  // The tokens that no document has.
  __device__ void clear(const Fwd& p, int step, int count) const {
    for (int row = m0; row < queries; row += step) {
      const int rows = min(queries - row, count), d = p.problem.d;
      clear_rows(out_rows(p, p.out, row), p.out.stride[2], rows, d);
      if (p.out_lo.data != nullptr) {
        clear_rows(out_rows(p, p.out_lo, row), p.out_lo.stride[2], rows, d);
      }
      float* g_lse = lse_rows(p, row);
      for (int i = threadIdx.x; i < rows; i += blockDim.x) g_lse[i] = -INFINITY;
    }
  }
};

// attention_fwd_sm90.cu
void attention_fwd_sm90(const Fwd& p, void* stream);

}  // namespace fastgpt::cuda

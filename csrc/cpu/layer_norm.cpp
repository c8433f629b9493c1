// y = (x - mean) * rstd * weight + bias, rstd = (var + eps)^-1/2, exact two-pass variance.
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, xhat the normalized
// x.
//
// Plan: a range of rows for each thread; a row stays in L1 between its passes. dweight and dbias:
// one partial sum per chunk of rows (a function of r alone), added in ascending order. Results
// larger than the caches are streamed past them. Learnt: threads that took items of rows in turn
// were 1.5x slower in one process out of five; rows of 12288 bf16 kept as floats between the
// passes, which do not fit into L1, took 1.8x the time.
// Bytes: forward reads x and writes y (r n each); add_layer_norm reads two and writes two; backward
// reads dy, x (and ds) and writes dx. Flops: about 8 n a row forward, 14 n backward: memory-bound.
// Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
#include "csrc/ops/layer_norm.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves

// y from the row x (n) and the sum of its elements. Asks for the row of the input that comes next,
// and for the lines of y, while it works in L1. kSplit: weight, bias and an x of floats are split.
template <bool kSplit, typename Source, typename T, typename Y>
void normalize_row(const Source* x, float sum, int64_t n, const float* weight, const float* bias,
                   float eps, bool streaming, const T* next, Y* y, float* mean_out,
                   float* rstd_out) {
  const float mean = sum / static_cast<float>(n);
  const Vec center = set1(mean);
  const float square = sum_vectors<kSplit>(
      n,
      [&](int64_t, int, Vec x_at) {
        const Vec d = x_at - center;
        return d * d;
      },
      [&](int64_t i) {
        prefetch_chunk(next + i);
        if (!streaming) prefetch_chunk(y + i, true);
      },
      x);
  const float rstd = 1.0f / __builtin_sqrtf(square / static_cast<float>(n) + eps);
  const Vec scale = set1(rstd);
  map_vectors<kSplit>(
      n, y, streaming,
      [&](int64_t i, int lanes, Vec x_at) {
        const Vec xhat = (x_at - center) * scale;
        return fma(xhat, load_lanes(weight + i, lanes), load_lanes(bias + i, lanes));
      },
      NothingAhead{}, x);
  *mean_out = mean;
  *rstd_out = rstd;
}

// s = x + residual, rounded, which goes to floats too if there are any; returns the sum of s.
template <bool kSplit, typename T>
float gather_sum(const T* x, const T* residual, T* s, int64_t n, bool streaming, float* floats) {
  const auto keep = [&](int64_t i, int lanes, Vec v) {
    if (floats != nullptr) store_lanes(floats + i, v, lanes);
    return v;
  };
  Vec even_sum = zero(), odd_sum = zero();
  int64_t first = 0;
  if constexpr (kSplit) {
    for (; first < split_part(n); first += kTwo) {
      const Two a = load_two<true>(x + first), b = load_two<true>(residual + first);
      const NativeUint even = bf16_high_of_plain(a.a + b.a), odd = bf16_high_of_plain(a.b + b.b);
      store_high_split(s + first, even, odd, streaming);
      even_sum = even_sum + keep(first, Vec::width, from_bits(even & 0xffff0000u));
      odd_sum = odd_sum + keep(first + Vec::width, Vec::width, from_bits(odd & 0xffff0000u));
    }
  }
  const float rest = sum_vectors<false>(
      n - first,
      [&](int64_t i, int lanes, Vec x_at, Vec residual_at) {
        const Vec v = rounded_to(T{}, x_at + residual_at);
        store_lanes(s + first + i, v, lanes, streaming);
        return keep(first + i, lanes, v);
      },
      NothingAhead{}, x + first, residual + first);
  return reduce_add(even_sum + odd_sum) + rest;
}

template <typename T, typename Y>
void forward(const LayerNormFwd& p) {
  constexpr bool kSplit = kSplits<T, Y>;
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const FloatParameter weights(p.weight, 1.0f, n, kSplit), biases(p.bias, 0.0f, n, kSplit);
  const float *weight = weights.data(), *bias = biases.data();
  const int tensors = p.residual ? 4 : 2;
  const bool stream_y = streams(p.y, tensors), stream_s = p.s && streams(p.s, tensors);
  const int workers = worker_count(r, kGrainElements / n + 1);
  // A sum on its way past the caches is kept besides, as floats.
  const WorkerScratch scratch(workers, stream_s ? n * sizeof(float) : 0);
  parallel_ranges(r, workers, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t row = begin; row < end; ++row) {
      T* x = row_of<T>(p.x, row);
      T* s = p.residual ? row_of<T>(p.s, row) : x;  // what is normalized
      float* floats = stream_s ? scratch.of(worker) : nullptr;
      const float sum =
          p.residual ? gather_sum<kSplit>(x, row_of<T>(p.residual, row), s, n, stream_s, floats)
                     : sum_vectors<kSplit>(
                           n, [](int64_t, int, Vec x_at) { return x_at; }, NothingAhead{}, x);
      const auto normalize = [&](const auto* source) {
        normalize_row<kSplit>(source, sum, n, weight, bias, p.eps, stream_y,
                              row_of<T>(p.x, row + 1), row_of<Y>(p.y, row),
                              static_cast<float*>(p.mean.data) + row,
                              static_cast<float*>(p.rstd.data) + row);
      };
      floats != nullptr ? normalize(floats) : normalize(s);
    }
    stream_fence();
  });
}

// One row of dx; adds the row's dy * xhat and dy to the partial sums dweight and dbias. weight and
// the sums are split where kSplits says so.
template <typename T, typename Y>
void backward_row(const LayerNormBwd& p, int64_t row, const float* weight, bool streaming,
                  float* dweight, float* dbias) {
  constexpr bool kSplit = kSplits<T, Y>;
  const int64_t n = p.x.size[1], pairs = split_part(n);
  const T* x = row_of<T>(p.x, row);
  const Y* dy = row_of<Y>(p.dy, row);
  const T* ds = p.ds ? row_of<T>(p.ds, row) : nullptr;
  T* dx = row_of<T>(p.dx, row);
  const Vec mean = set1(static_cast<const float*>(p.mean.data)[row]);
  const Vec rstd = set1(static_cast<const float*>(p.rstd.data)[row]);
  constexpr int kChains = 2;  // of each sum: as many as the registers of AVX2 hold
  Vec sum_g[kChains] = {zero(), zero()}, sum_gx[kChains] = {zero(), zero()};
  const auto accumulate = [&](int chain, Vec x_at, Vec dy_at, Vec weight_at) {
    const Vec g = dy_at * weight_at;
    sum_g[chain] = sum_g[chain] + g;
    sum_gx[chain] = fma(g, (x_at - mean) * rstd, sum_gx[chain]);
  };
  for (int64_t i = 0; i < pairs; i += kTwo) {
    const Two x_at = load_two<kSplit>(x + i), dy_at = load_two<kSplit>(dy + i);
    accumulate(0, x_at.a, dy_at.a, load(weight + i));
    accumulate(1, x_at.b, dy_at.b, load(weight + i + Vec::width));
  }
  for_vectors(n - pairs, [&](int64_t rest, int lanes) {
    const int64_t i = pairs + rest;
    const Vec x_at = select(first_lanes(lanes), load_lanes(x + i, lanes), mean);
    accumulate(0, x_at, load_lanes(dy + i, lanes), load_lanes(weight + i, lanes));
  });
  const float inverse_n = 1.0f / static_cast<float>(n);
  const Vec mean_g = set1(reduce_add(sum_g[0] + sum_g[1]) * inverse_n);
  const Vec mean_gx = set1(reduce_add(sum_gx[0] + sum_gx[1]) * inverse_n);
  // dx before ds is added; the sums of one vector.
  const auto finish = [&](int64_t i, int lanes, Vec x_at, Vec dy_at) {
    const Vec xhat = (x_at - mean) * rstd;
    if (dweight != nullptr) {
      store_lanes(dweight + i, fma(dy_at, xhat, load_lanes(dweight + i, lanes)), lanes);
    }
    if (dbias != nullptr) store_lanes(dbias + i, dy_at + load_lanes(dbias + i, lanes), lanes);
    return rstd * ((dy_at * load_lanes(weight + i, lanes) - mean_g) - xhat * mean_gx);
  };
  for (int64_t i = 0; i < pairs; i += kTwo) {
    const Two x_at = load_two<kSplit>(x + i), dy_at = load_two<kSplit>(dy + i);
    const Two ds_at = ds != nullptr ? load_two<kSplit>(ds + i) : Two{zero(), zero()};
    const Vec a = finish(i, Vec::width, x_at.a, dy_at.a);
    const Vec b = finish(i + Vec::width, Vec::width, x_at.b, dy_at.b);
    store_two<kSplit>(dx + i, a + ds_at.a, b + ds_at.b, streaming);
  }
  for_vectors(n - pairs, [&](int64_t rest, int lanes) {
    const int64_t i = pairs + rest;
    Vec d = finish(i, lanes, load_lanes(x + i, lanes), load_lanes(dy + i, lanes));
    if (ds != nullptr) d = d + load_lanes(ds + i, lanes);
    store_lanes(dx + i, d, lanes, streaming);
  });
}

// out (n): the partial sums of the chunks, `step` apart, in ascending order; split or not.
void sum_chunks(const float* partial, int64_t chunks, int64_t step, bool split,
                const TensorRef& out) {
  float* sums = static_cast<float*>(out.data);
  parallel_for(out.size[0], kGrainElements / (chunks + 1) + 1, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, int lanes) {
      Vec sum = zero();
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum = sum + load_lanes(partial + chunk * step + begin + i, lanes);
      }
      store_lanes(sums + begin + i, sum, lanes);
    });
  });
  if (split) reorder_pairs(sums, out.size[0], false);
}

template <typename T, typename Y>
void backward(const LayerNormBwd& p) {
  constexpr bool kSplit = kSplits<T, Y>;
  const int64_t r = p.x.size[0], n = p.x.size[1];
  constexpr int64_t kMaxChunks = 64, kMinChunkRows = 8;
  const int64_t balanced = (r + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk_rows = balanced < kMinChunkRows ? kMinChunkRows : balanced;
  const int64_t chunks = (r + chunk_rows - 1) / chunk_rows;
  const int64_t sums = (p.dweight ? 1 : 0) + (p.dbias ? 1 : 0);
  const FloatParameter weights(p.weight, 1.0f, n, kSplit);
  const float* weight = weights.data();
  const Scratch scratch(chunks * sums * n * sizeof(float));
  float* partial = scratch.at();
  const bool streaming = streams(p.dx, p.ds ? 4 : 3);
  parallel_for(chunks, kGrainElements / (n * chunk_rows) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* mine = partial + chunk * sums * n;
      for (int64_t i = 0; i < sums * n; ++i) mine[i] = 0.0f;
      const int64_t last = (chunk + 1) * chunk_rows < r ? (chunk + 1) * chunk_rows : r;
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        backward_row<T, Y>(p, row, weight, streaming, p.dweight ? mine : nullptr,
                           p.dbias ? mine + (sums - 1) * n : nullptr);
      }
    }
    stream_fence();
  });
  if (p.dweight) sum_chunks(partial, chunks, sums * n, kSplit, p.dweight);
  if (p.dbias) sum_chunks(partial + (sums - 1) * n, chunks, sums * n, kSplit, p.dbias);
}

}  // namespace

void layer_norm_fwd_kernel(const LayerNormFwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.y.dtype == p.x.dtype ? forward<T, T>(p) : forward<T, float>(p);
  });
}

void layer_norm_bwd_kernel(const LayerNormBwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.dy.dtype == p.x.dtype ? backward<T, T>(p) : backward<T, float>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

// What linear_cross_entropy needs between torch's matrix products and the kernels of cross_entropy:
// to = factor (a + b), which adds a bias or a partial product, and rounds a finished sum; and the
// sums over the rows of dlogits, the gradient of the bias.
//
// Plan: sums element by element, a block a row; over rows, a thread a column and chunk of rows, and
// a second kernel adds the chunks in ascending order.
// Bytes: each operand once: memory-bound.
#include "csrc/ops/linear_cross_entropy.h"

#include "csrc/cuda/column_sums.cuh"
#include "csrc/cuda/rows.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kColumnThreads = 128;
constexpr int kPack = 4;

__device__ float scalar(const TensorRef& t) {
  return t.data == nullptr ? 1.0f : *static_cast<const float*>(t.data);
}

template <typename Y, int kCount>
__global__ void __launch_bounds__(kMaxRowThreads) add_scaled_kernel(AddScaled p) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (row >= p.b.size[0]) return;
  const float divisor = scalar(p.divisor);
  const float factor = divisor == 0.0f ? 0.0f : scalar(p.numerator) / divisor;
  const float* g_a = p.a.data == nullptr ? nullptr : row_of<const float>(p.a, row);
  const float* g_b = row_of<const float>(p.b, row);
  Y* g_to = row_of<Y>(p.to, row);
  for_packs<kCount, false>(static_cast<int>(p.b.size[1]), [&](int, int i) {
    float r_a[kCount] = {}, r_b[kCount];
    if (g_a != nullptr) load<kCount>(g_a + i, r_a);
    load<kCount>(g_b + i, r_b);
#pragma unroll
    for (int e = 0; e < kCount; ++e) r_b[e] = (r_a[e] + r_b[e]) * factor;
    store<kCount>(g_to + i, r_b);
  });
}

// g_partial (chunks, n).
__global__ void __launch_bounds__(kColumnThreads)
    column_sums_kernel(TensorRef x, int64_t chunk_rows, float* g_partial) {
  const int64_t r = x.size[0], n = x.size[1];
  const int64_t tiles = (n + kColumnThreads - 1) / kColumnThreads;
  const int64_t column = blockIdx.x % tiles * kColumnThreads + threadIdx.x;
  const int64_t chunk = blockIdx.x / tiles, first = chunk * chunk_rows;
  if (column >= n) return;
  float sum = 0.0f;
  for (int64_t row = first; row < first + chunk_rows && row < r; ++row) {
    sum += row_of<const float>(x, row)[column];
  }
  g_partial[chunk * n + column] = sum;
}

}  // namespace

void add_scaled(const AddScaled& p, void* stream) {
  const RowPlan plan = plan_rows(p.b.size[1], kPack, {p.a, p.b, p.to});
  visit_dtype<__nv_bfloat16, __half>(p.to.dtype, [&](auto type) {
    visit_pack<kPack>(plan, [&](auto pack) {
      using Y = typename decltype(type)::type;
      launch(add_scaled_kernel<Y, decltype(pack)::kValue>, grid_of_rows(plan, p.b.size[0]),
             block_of_rows(plan), 0, stream, p);
    });
  });
}

int64_t add_column_sums_workspace(int64_t r, int64_t n) {
  return chunks_of(r) * n;
}

void add_column_sums(const AddColumnSums& p, float* workspace, void* stream) {
  const int64_t r = p.x.size[0], n = p.x.size[1], chunks = chunks_of(r);
  const int64_t tiles = (n + kColumnThreads - 1) / kColumnThreads;
  launch(column_sums_kernel, dim3(grid_size(chunks * tiles)), dim3(kColumnThreads), 0, stream, p.x,
         chunk_rows_of(r), workspace);
  float* sum = static_cast<float*>(p.sum.data);
  sum_chunks(workspace, chunks, n, n, {sum, nullptr}, stream, true);
}

}  // namespace fastgpt::cuda

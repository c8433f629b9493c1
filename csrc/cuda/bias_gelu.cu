// y = gelu(z), z = x + bias; dx = dy * gelu'(z); dbias = sum of dx over the rows.
// erf: z Phi(z). tanh: z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3), which is
// z (1 + tanh u) / 2 without the cancellation; from exp(-|2u|), which does not overflow.
//
// Plan: a block takes a tile of columns through a chunk of rows, 16 bytes a thread, several rows
// under way, so that bias and the sum of dbias stay in registers; dbias as column_sums.cuh says.
// Bytes: forward reads x and writes y (r n each), backward reads dy and x and writes dx:
// memory-bound. Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415
#include "csrc/ops/bias_gelu.h"

#include "csrc/common/math.h"
#include "csrc/cuda/column_sums.cuh"
#include "csrc/cuda/rows.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 128;  // of a tile of columns
constexpr int kBlocks = 8;     // of a multiprocessor at least
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.707106781f;
constexpr float kInverseSqrt2Pi = 0.398942280f;

// exp(-|2u|), from z and z * z.
__device__ float tanh_decay(float z, float square) {
  constexpr float kSlope = -2.0f * kSqrt2OverPi * kLog2E;
  return exp2f(fabsf(z) * fmaf(square, kSlope * kCubic, kSlope));
}

__device__ float normal_cdf(float z) {
  return fmaf(0.5f, erff(z * kSqrtHalf), 0.5f);
}

template <bool kTanh>
__device__ float gelu(float z) {
  if (!kTanh) return z * normal_cdf(z);
  const float decay = tanh_decay(z, z * z);
  return (z < 0.0f ? z * decay : z) / (1.0f + decay);
}

template <bool kTanh>
__device__ float gelu_derivative(float z) {
  const float square = z * z;
  if (kTanh) {
    const float decay = tanh_decay(z, square);
    const float high = 1.0f / (1.0f + decay), low = decay * high;
    const float slope = fmaf(square, 6.0f * kSqrt2OverPi * kCubic, 2.0f * kSqrt2OverPi);
    return fmaf(z * high * low, slope, z < 0.0f ? low : high);
  }
  const float density = exp2f(square * (-0.5f * kLog2E)) * kInverseSqrt2Pi;
  return fmaf(z, density, normal_cdf(z));
}

// The tile of a block: its thread's first column, and its chunk of rows.
struct Tile {
  int64_t column, first_row, last_row, chunk;
  __device__ Tile(int64_t r, int64_t n, int64_t chunk_rows, int pack) {
    const int64_t tiles = (n + kThreads * pack - 1) / (kThreads * pack);
    chunk = blockIdx.x / tiles;
    column = (blockIdx.x % tiles * kThreads + threadIdx.x) * pack;
    first_row = chunk * chunk_rows;
    last_row = first_row + chunk_rows < r ? first_row + chunk_rows : r;
  }
  // This thread's packs of the kRows rows from `row` on, all on their way.
  template <int kPack, int kRows, typename T>
  __device__ void read(const TensorRef& t, int64_t row, Pack<T, kPack> (&r_to)[kRows]) const {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (row + k < last_row) r_to[k] = load_pack<kPack>(row_of<const T>(t, row + k) + column);
    }
  }
};

template <typename T, int kPack, bool kTanh>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bias_gelu_fwd_kernel(BiasGeluFwd p, int64_t chunk_rows) {
  constexpr int kRows = 4;  // under way at once
  const Tile tile(p.x.size[0], p.x.size[1], chunk_rows, kPack);
  if (tile.column >= p.x.size[1]) return;
  float r_bias[kPack];
  parameters(p.bias, tile.column, 0.0f, r_bias);
  for (int64_t row = tile.first_row; row < tile.last_row; row += kRows) {
    Pack<T, kPack> r_x[kRows];
    tile.read(p.x, row, r_x);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (row + k >= tile.last_row) break;
      float r_y[kPack];
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        r_y[e] = gelu<kTanh>(to_float(r_x[k].value[e]) + r_bias[e]);
      }
      store<kPack>(row_of<T>(p.y, row + k) + tile.column, r_y);
    }
  }
}

// g_partial (chunks, n), or nullptr without dbias.
template <typename T, int kPack, bool kTanh>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bias_gelu_bwd_kernel(BiasGeluBwd p, int64_t chunk_rows, float* g_partial) {
  constexpr int kRows = 2;  // of each of dy and x
  const int64_t n = p.x.size[1];
  const Tile tile(p.x.size[0], n, chunk_rows, kPack);
  if (tile.column >= n) return;
  float r_bias[kPack], r_dbias[kPack] = {};
  parameters(p.bias, tile.column, 0.0f, r_bias);
  for (int64_t row = tile.first_row; row < tile.last_row; row += kRows) {
    Pack<T, kPack> r_x[kRows], r_dy[kRows];
    tile.read(p.x, row, r_x);
    tile.read(p.dy, row, r_dy);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (row + k >= tile.last_row) break;
      float r_dx[kPack];
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float z = to_float(r_x[k].value[e]) + r_bias[e];
        r_dx[e] = to_float(r_dy[k].value[e]) * gelu_derivative<kTanh>(z);
        r_dbias[e] += r_dx[e];
      }
      store<kPack>(row_of<T>(p.dx, row + k) + tile.column, r_dx);
    }
  }
  if (g_partial != nullptr) store<kPack>(g_partial + tile.chunk * n + tile.column, r_dbias);
}

// f(Type<T>, Constant<pack>, Constant<tanh>, grid).
template <typename F>
void for_tiles(const TensorRef& x, std::initializer_list<TensorRef> tensors, bool tanh,
               const F& f) {
  const int64_t r = x.size[0], n = x.size[1];
  const RowPlan plan = plan_rows(n, pack_of(x), tensors);
  visit_dtype<__nv_bfloat16, __half>(x.dtype, [&](auto type) {
    constexpr int kWide = 16 / sizeof(typename decltype(type)::type);
    visit_pack<kWide>(plan, [&](auto pack) {
      constexpr int kPack = decltype(pack)::kValue;
      const int64_t tiles = (n + kThreads * kPack - 1) / (kThreads * kPack);
      const dim3 grid(grid_size(chunks_of(r) * tiles));
      visit_bool(tanh, [&](auto is_tanh) { f(type, pack, is_tanh, grid); });
    });
  });
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& p, void* stream) {
  for_tiles(p.x, {p.x, p.y}, p.tanh, [&](auto type, auto pack, auto tanh, dim3 grid) {
    using T = typename decltype(type)::type;
    launch(bias_gelu_fwd_kernel<T, decltype(pack)::kValue, decltype(tanh)::kValue>, grid,
           dim3(kThreads), 0, stream, p, chunk_rows_of(p.x.size[0]));
  });
}

int64_t bias_gelu_bwd_workspace(int64_t r, int64_t n) {
  return chunks_of(r) * n;
}

void bias_gelu_bwd(const BiasGeluBwd& p, float* workspace, void* stream) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  float* partial = p.dbias ? workspace : nullptr;
  for_tiles(p.x, {p.x, p.dy, p.dx}, p.tanh, [&](auto type, auto pack, auto tanh, dim3 grid) {
    using T = typename decltype(type)::type;
    launch(bias_gelu_bwd_kernel<T, decltype(pack)::kValue, decltype(tanh)::kValue>, grid,
           dim3(kThreads), 0, stream, p, chunk_rows_of(r), partial);
  });
  float* dbias = static_cast<float*>(p.dbias.data);
  sum_chunks(workspace, chunks_of(r), n, n, {dbias, nullptr}, stream);
}

}  // namespace fastgpt::cuda

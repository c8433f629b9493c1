// y = gelu(z), z = x + bias; dx = dy * gelu'(z); dbias = sum of dx over the rows.
// erf: z Phi(z). tanh: z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3), which is
// z (1 + tanh u) / 2 without the cancellation; from exp(-|2u|), which does not overflow.
//
// Plan: threads over rows. dbias: one partial sum per chunk of rows (a function of r alone), added
// in ascending order, first within groups.
// Bytes: forward reads x and writes y (r n each), backward reads dy and x and writes dx. Flops:
// about 25 per entry forward, 40 backward.
// Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415
#include "csrc/ops/bias_gelu.h"

#include "csrc/common/dispatch.h"
#include "csrc/common/math.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;  // below this a second thread costs more than it saves
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kCubic = 0.044715f;
constexpr float kSqrtHalf = 0.707106781f;
constexpr float kInverseSqrt2Pi = 0.398942280f;

// exp(-|2u|), from z and z * z.
FASTGPT_INLINE Vec tanh_decay(Vec z, Vec square) {
  constexpr float kSlope = -2.0f * kSqrt2OverPi * kLog2E;
  return exp2(abs(z) * fma(square, set1(kSlope * kCubic), set1(kSlope)));
}

FASTGPT_INLINE Vec normal_cdf(Vec z) {
  return fma(set1(0.5f), erf(z * set1(kSqrtHalf)), set1(0.5f));
}

template <bool kTanh>
FASTGPT_INLINE Vec gelu(Vec z) {
  if (!kTanh) return z * normal_cdf(z);
  const Vec decay = tanh_decay(z, z * z);
  return select(z < zero(), z * decay, z) / (set1(1.0f) + decay);
}

template <bool kTanh>
FASTGPT_INLINE Vec gelu_derivative(Vec z) {
  const Vec square = z * z;
  if (kTanh) {
    const Vec decay = tanh_decay(z, square);
    const Vec high = set1(1.0f) / (set1(1.0f) + decay), low = decay * high;
    const Vec slope = fma(square, set1(6.0f * kSqrt2OverPi * kCubic), set1(2.0f * kSqrt2OverPi));
    return fma(z * high * low, slope, select(z < zero(), low, high));
  }
  const Vec density = exp2(square * set1(-0.5f * kLog2E)) * set1(kInverseSqrt2Pi);
  return fma(z, density, normal_cdf(z));
}

template <typename T, bool kTanh>
void forward(const BiasGeluFwd& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const FloatParameter biases(p.bias, 0.0f, n, kSplits<T>);
  const float* bias = biases.data();
  const bool streaming = streams(p.y, 2);
  parallel_for(r, kGrainElements / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = row_of<T>(p.x, row);
      T* y = row_of<T>(p.y, row);
      map_vectors<kSplits<T>>(
          n, y, streaming,
          [&](int64_t i, int lanes, Vec x_at) {
            return gelu<kTanh>(x_at + load_lanes(bias + i, lanes));
          },
          NothingAhead{}, x);
    }
    stream_fence();
  });
}

template <typename T, bool kTanh>
void backward(const BiasGeluBwd& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  constexpr int64_t kMaxChunks = 256, kMinChunkRows = 16, kGroup = 16;
  const int64_t balanced = (r + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk_rows = balanced < kMinChunkRows ? kMinChunkRows : balanced;
  const int64_t chunks = (r + chunk_rows - 1) / chunk_rows;
  const FloatParameter biases(p.bias, 0.0f, n, kSplits<T>);
  const float* bias = biases.data();
  const Scratch scratch((p.dbias ? chunks : 0) * n * sizeof(float));
  float* partial = scratch.at();
  const bool streaming = streams(p.dx, 3);
  parallel_for(chunks, kGrainElements / (n * chunk_rows) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* dbias = p.dbias ? partial + chunk * n : nullptr;
      if (dbias != nullptr) std::memset(dbias, 0, n * sizeof(float));
      const int64_t last = (chunk + 1) * chunk_rows < r ? (chunk + 1) * chunk_rows : r;
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        const T* x = row_of<T>(p.x, row);
        const T* dy = row_of<T>(p.dy, row);
        T* dx = row_of<T>(p.dx, row);
        map_vectors<kSplits<T>>(
            n, dx, streaming,
            [&](int64_t i, int lanes, Vec x_at, Vec dy_at) {
              const Vec z = x_at + load_lanes(bias + i, lanes);
              const Vec dz = dy_at * gelu_derivative<kTanh>(z);
              if (dbias != nullptr) {
                store_lanes(dbias + i, load_lanes(dbias + i, lanes) + dz, lanes);
              }
              return dz;
            },
            NothingAhead{}, x, dy);
      }
    }
    stream_fence();
  });
  if (!p.dbias) return;
  float* sums = static_cast<float*>(p.dbias.data);
  parallel_for(n, kGrainElements / (chunks + 1) + 1, [&](int64_t begin, int64_t end) {
    for_vectors(end - begin, [&](int64_t i, int lanes) {
      Vec sum = zero();
      for (int64_t group = 0; group < chunks; group += kGroup) {
        Vec part = zero();
        for (int64_t chunk = group; chunk < group + kGroup && chunk < chunks; ++chunk) {
          part = part + load_lanes(partial + chunk * n + begin + i, lanes);
        }
        sum = sum + part;
      }
      store_lanes(sums + begin + i, sum, lanes);
    });
  });
  if (kSplits<T>) reorder_pairs(sums, n, false);
}

}  // namespace

void bias_gelu_fwd_kernel(const BiasGeluFwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.tanh ? forward<T, true>(p) : forward<T, false>(p);
  });
}

void bias_gelu_bwd_kernel(const BiasGeluBwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.tanh ? backward<T, true>(p) : backward<T, false>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

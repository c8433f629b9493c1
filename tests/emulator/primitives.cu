// Each primitive of csrc/cuda/{copy,mma,reduce}.cuh against the PTX ISA's description of it,
// written down here once more in plain loops. fastgpt_*_cases [name | --list]
#include <cmath>
#include <exception>

#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/reduce.cuh"
#include "tests/emulator/cases.h"

namespace fastgpt::cases {
namespace {

using namespace cuda;

constexpr float kNothing = INFINITY;

// ---- copies ----

__global__ void copy_kernel(const unsigned char* g_from, unsigned char* g_to) {
  FASTGPT_DYNAMIC_SHARED(s_chunks);
  const int lane = threadIdx.x;
  if (lane <= kChunkBytes) copy_chunk_async(s_chunks + 16 * lane, g_from + 16 * lane, lane);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  // Another lane's chunk: what has arrived is seen by all.
  const int other = kChunkBytes - lane;
  if (other >= 0) store_chunk(g_to + 16 * other, load_chunk(s_chunks + 16 * other));
}

const Register copies("copy_chunk_async fills up with zeros", [] {
  Buffer<unsigned char> from(17 * 16), to(17 * 16);
  for (size_t i = 0; i < from.count(); ++i) from[i] = static_cast<unsigned char>(i * 7 + 1);
  run_block(copy_kernel, 32, 17 * 16, from.data(), to.data());
  for (size_t i = 0; i < to.count(); ++i) {
    const bool copied = i % 16 < i / 16;
    require_equal<int>("byte", i, to[i], copied ? from[i] : 0);
  }
});

__global__ void group_kernel(const uint4* g_from, uint4* g_to) {
  FASTGPT_SHARED(uint4, s_chunks, 4 * kWarp);
  const int lane = threadIdx.x;
  for (int group = 0; group < 3; ++group) {
    copy_chunk_async(&s_chunks[group * kWarp + lane], g_from + group * kWarp + lane);
    commit_copies();
  }
  commit_copies();  // a group of nothing counts too
  wait_copies<3>();
  g_to[lane] = s_chunks[lane];
  wait_copies<1>();
  for (int group = 1; group < 3; ++group) {
    g_to[group * kWarp + lane] = s_chunks[group * kWarp + lane];
  }
  copy_chunk_async(&s_chunks[3 * kWarp + lane], g_from);
  wait_copies<0>();  // of committed groups only
  commit_copies();
  wait_copies<0>();
  g_to[3 * kWarp + lane] = s_chunks[3 * kWarp + lane];
}

const Register groups("wait_copies counts groups", [] {
  Buffer<uint4> from(3 * 32), to(4 * 32);
  for (unsigned i = 0; i < from.count(); ++i) from[i] = make_uint4(i, i + 1, i + 2, i + 3);
  run_block(group_kernel, 32, 0, from.data(), to.data());
  for (size_t i = 0; i < from.count(); ++i) require_equal("chunk", i, to[i].w, from[i].w);
  for (size_t i = 0; i < 32; ++i) require_equal("last group", i, to[96 + i].w, from[0].w);
});

template <typename T, int kCount>
__global__ void store_kernel(T* g_to) {
  float r_values[kCount];
  for (int e = 0; e < kCount; ++e) r_values[e] = static_cast<float>(threadIdx.x * kCount + e);
  store<kCount>(g_to + threadIdx.x * kCount, r_values);
}

template <typename T, int kCount>
void check_store() {
  Buffer<T> to(33 * kCount);
  run_block(store_kernel<T, kCount>, 32, 0, to.data());
  for (size_t i = 0; i < 32 * kCount; ++i) {
    require_equal("element", i, static_cast<float>(to[i]), static_cast<float>(i));
  }
  const unsigned char* after = reinterpret_cast<const unsigned char*>(to.data() + 32 * kCount);
  for (size_t i = 0; i < kCount * sizeof(T); ++i) require_equal<int>("behind", i, after[i], 0xff);
}

const Register stores("store writes packs of 2 to 32 bytes and no more", [] {
  check_store<float, 1>();
  check_store<float, 4>();
  check_store<float, 8>();
  check_store<__nv_bfloat16, 1>();
  check_store<__nv_bfloat16, 4>();
  check_store<__nv_bfloat16, 8>();
  check_store<__half, 4>();
  check_store<__half, 8>();
});

template <int kChunks>
void check_swizzle() {
  constexpr int kRows = 16;
  std::vector<int> used(kRows * kChunks);
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) ++used.at(swizzled<kChunks>(row, chunk));
  }
  for (size_t i = 0; i < used.size(); ++i) require_equal("place", i, used[i], 1);
  for (int row = 0; row < kRows; row += 8) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) banks |= 1u << swizzled<kChunks>(row + i, chunk) % 8;
      require_equal("banks of a column of chunks", kChunks, banks, 0xffu);
    }
  }
}

const Register swizzles("swizzled is a permutation without bank conflicts", [] {
  check_swizzle<1>();
  check_swizzle<2>();
  check_swizzle<4>();
  check_swizzle<5>();
  check_swizzle<8>();
  check_swizzle<10>();
  check_swizzle<12>();
  check_swizzle<16>();
  check_swizzle<20>();
  check_swizzle<24>();
  check_swizzle<32>();
});

// ---- matrices ----

// Rows are 5 chunks apart, so that a wrong row or a wrong chunk shows.
template <int kCount, bool kTransposed>
__global__ void load_kernel(uint32_t* g_r) {
  FASTGPT_SHARED(uint16_t, s_tile, 32 * 40);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32 * 40; i += kWarp) s_tile[i] = static_cast<uint16_t>(i);
  __syncwarp();
  // Lanes whose address does not count give one that would be refused.
  const uint16_t* s_row = lane < 8 * kCount ? s_tile + lane * 40 + 8 : s_tile + 1;
  uint32_t r[kCount];
  load_matrices<kCount, kTransposed>(r, s_row);
  for (int m = 0; m < kCount; ++m) g_r[m * kWarp + lane] = r[m];
}

template <int kCount, bool kTransposed>
void check_load() {
  Buffer<uint32_t> r(kCount * 32);
  run_block(load_kernel<kCount, kTransposed>, 32, 0, r.data());
  for (size_t i = 0; i < r.count(); ++i) {
    const unsigned matrix = static_cast<unsigned>(i) / 32, lane = i % 32;
    for (unsigned e = 0; e < 2; ++e) {
      unsigned row = lane / 4, column = lane % 4 * 2 + e;
      if (kTransposed) std::swap(row, column);
      const unsigned element = (matrix * 8 + row) * 40 + 8 + column;
      require_equal(kTransposed ? "transposed" : "register", i, r[i] >> 16 * e & 0xffff, element);
    }
  }
}

const Register loads("load_matrices of 1, 2 and 4, also transposed", [] {
  check_load<1, false>();
  check_load<2, false>();
  check_load<4, false>();
  check_load<1, true>();
  check_load<2, true>();
  check_load<4, true>();
});

// The tables "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8" of
// the PTX ISA: where element i of a lane's fragment lies.
struct Place {
  int row, column;
};

Place place_of_a(int lane, int i) {
  return {lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8), lane % 4 * 2 + i % 2 + (i < 4 ? 0 : 8)};
}
Place place_of_b(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + (i < 2 ? 0 : 8), lane / 4};
}
Place place_of_c(int lane, int i) {
  return {lane / 4 + (i < 2 ? 0 : 8), lane % 4 * 2 + i % 2};
}
Place place_of_a_tf32(int lane, int i) {
  return {lane / 4 + (i == 0 || i == 2 ? 0 : 8), lane % 4 + (i < 2 ? 0 : 4)};
}
Place place_of_b_tf32(int lane, int i) {
  return {lane % 4 + (i == 0 ? 0 : 4), lane / 4};
}

template <typename T>
__global__ void mma_kernel(const T* g_a, const T* g_b, float* g_c) {
  const int lane = threadIdx.x;
  uint32_t r_a[4], r_b[2];
  float r_c[4];
  for (int i = 0; i < 4; ++i) {
    r_a[i] = pack_pair<T>(to_float(g_a[lane * 8 + 2 * i]), to_float(g_a[lane * 8 + 2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    r_b[i] = pack_pair<T>(to_float(g_b[lane * 4 + 2 * i]), to_float(g_b[lane * 4 + 2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) r_c[i] = g_c[lane * 4 + i];
  mma_16x8x16<T>(r_c, r_a, r_b);
  for (int i = 0; i < 4; ++i) g_c[lane * 4 + i] = r_c[i];
}

__global__ void mma_tf32_kernel(const float* g_a, const float* g_b, float* g_c) {
  const int lane = threadIdx.x;
  uint32_t r_a[4], r_b[2];
  float r_c[4];
  for (int i = 0; i < 4; ++i) r_a[i] = to_tf32(g_a[lane * 4 + i]);
  for (int i = 0; i < 2; ++i) r_b[i] = to_tf32(g_b[lane * 2 + i]);
  for (int i = 0; i < 4; ++i) r_c[i] = g_c[lane * 4 + i];
  mma_16x8x8_tf32(r_c, r_a, r_b);
  for (int i = 0; i < 4; ++i) g_c[lane * 4 + i] = r_c[i];
}

// Small integers, so that every sum is exact in any order; all rows and columns differ.
float a_of(int row, int k) {
  return static_cast<float>((row * 5 + k * 3 + row * k) % 17 - 8);
}
float b_of(int k, int column) {
  return static_cast<float>((k * 7 + column * 2 + k * k * column) % 13 - 6);
}
float c_of(int row, int column) {
  return static_cast<float>(row * 8 + column);
}

void check_product(int depth, const Buffer<float>& c) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = place_of_c(lane, i);
      float want = c_of(at.row, at.column);
      for (int k = 0; k < depth; ++k) want += a_of(at.row, k) * b_of(k, at.column);
      require_equal("c", static_cast<size_t>(lane * 4 + i), c[lane * 4 + i], want);
    }
  }
}

template <typename T, typename FromFloat>
void check_mma(const FromFloat& from) {
  Buffer<T> a(32 * 8), b(32 * 4);
  Buffer<float> c(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      a[lane * 8 + i] = from(a_of(place_of_a(lane, i).row, place_of_a(lane, i).column));
    }
    for (int i = 0; i < 4; ++i) {
      b[lane * 4 + i] = from(b_of(place_of_b(lane, i).row, place_of_b(lane, i).column));
      c[lane * 4 + i] = c_of(place_of_c(lane, i).row, place_of_c(lane, i).column);
    }
  }
  run_block(mma_kernel<T>, 32, 0, a.data(), b.data(), c.data());
  check_product(16, c);
}

const Register bf16_products("mma of bfloat16", [] {
  check_mma<__nv_bfloat16>([](float x) { return __float2bfloat16_rn(x); });
});
const Register f16_products("mma of float16",
                            [] { check_mma<__half>([](float x) { return __float2half_rn(x); }); });

const Register tf32_products("mma of TF32", [] {
  Buffer<float> a(32 * 4), b(32 * 2), c(32 * 4);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      a[lane * 4 + i] = a_of(place_of_a_tf32(lane, i).row, place_of_a_tf32(lane, i).column);
      c[lane * 4 + i] = c_of(place_of_c(lane, i).row, place_of_c(lane, i).column);
    }
    for (int i = 0; i < 2; ++i) {
      b[lane * 2 + i] = b_of(place_of_b_tf32(lane, i).row, place_of_b_tf32(lane, i).column);
    }
  }
  run_block(mma_tf32_kernel, 32, 0, a.data(), b.data(), c.data());
  check_product(8, c);
});

__global__ void round_kernel(const float* g_x, uint32_t* g_bits) {
  g_bits[threadIdx.x] = to_tf32(g_x[threadIdx.x]) & 0xffffe000u;
}

const Register tf32_rounding("to_tf32 rounds ties away from zero", [] {
  const float ulp = ldexpf(1.0f, -10);
  const std::vector<std::pair<float, float>> known = {{1.0f, 1.0f},
                                                      {1.0f + ulp / 2, 1.0f + ulp},
                                                      {-1.0f - ulp / 2, -1.0f - ulp},
                                                      {1.0f + ulp * 0.49f, 1.0f},
                                                      {1.0f + ulp * 1.5f, 1.0f + ulp * 2},
                                                      {2.0f - ulp / 4, 2.0f},
                                                      {0.0f, 0.0f},
                                                      {-INFINITY, -INFINITY}};
  Buffer<float> x(32);
  Buffer<uint32_t> bits(32);
  for (size_t i = 0; i < 32; ++i) x[i] = known[i % known.size()].first;
  run_block(round_kernel, 32, 0, x.data(), bits.data());
  for (size_t i = 0; i < 32; ++i) {
    float got;
    std::memcpy(&got, &bits[i], sizeof got);
    require_equal("x", i, got, known[i % known.size()].second);
  }
});

// ---- shuffles, votes, reductions ----

__global__ void shuffle_kernel(int* g_got) {
  const int lane = threadIdx.x;
  int* g_own = g_got + lane * 8;
  g_own[0] = __shfl_sync(kFullWarp, lane, lane + 5);
  g_own[1] = __shfl_sync(kFullWarp, lane, 1, 8);
  g_own[2] = __shfl_up_sync(kFullWarp, lane, 3);
  g_own[3] = __shfl_down_sync(kFullWarp, lane, 3, 16);
  g_own[4] = __shfl_xor_sync(kFullWarp, lane, 9);
  g_own[5] = __shfl_xor_sync(kFullWarp, lane, 8, 8);
  g_own[6] = static_cast<int>(__ballot_sync(kFullWarp, lane % 3 == 0));
  g_own[7] = 0;
  if (lane < 16) {
    g_own[7] = __any_sync(0xffffu, lane == 3) + 2 * __all_sync(0xffffu, lane < 16) +
               4 * __all_sync(0xffffu, lane != 3) + 8 * __any_sync(0xffffu, lane > 15);
  }
}

const Register shuffles("shuffles and votes", [] {
  Buffer<int> got(32 * 8);
  run_block(shuffle_kernel, 32, 0, got.data());
  int thirds = 0;
  for (unsigned lane = 0; lane < 32; lane += 3) thirds |= static_cast<int>(1u << lane);
  for (int lane = 0; lane < 32; ++lane) {
    const int segment = lane / 8 * 8;
    const int want[8] = {(lane + 5) % 32,
                         segment + 1,
                         lane >= 3 ? lane - 3 : lane,
                         lane % 16 + 3 < 16 ? lane + 3 : lane,
                         lane ^ 9,
                         (lane ^ 8) < segment + 8 ? lane ^ 8 : lane,
                         thirds,
                         lane < 16 ? 3 : 0};
    for (int i = 0; i < 8; ++i) {
      require_equal("value", static_cast<size_t>(lane * 8 + i), got[lane * 8 + i], want[i]);
    }
  }
});

__global__ void reduce_kernel(float* g_got) {
  FASTGPT_SHARED(float, s_partial, 2 * kWarp);
  const int thread = threadIdx.x;
  float sums[2] = {static_cast<float>(thread), 1.0f};
  const float x = static_cast<float>(thread * 37 % 101) - 200.0f;
  const float four = warp_sum<4>(sums[0]), most = warp_max<8>(x);
  block_sum(sums, s_partial);
  const float highest = block_max(x, s_partial);
  const int agree = __syncthreads_or(thread == 5) + 2 * __syncthreads_and(thread != 5) +
                    4 * __syncthreads_count(thread < 7);
  const float own[6] = {sums[0], sums[1], highest, four, most, static_cast<float>(agree)};
  for (int i = 0; i < 6; ++i) g_got[thread * 6 + i] = own[i];
}

const Register reductions("sums and maxima of warps and blocks", [] {
  for (const int threads : {32, 64, 160, 1024}) {
    Buffer<float> got(static_cast<size_t>(threads) * 6);
    run_block(reduce_kernel, static_cast<unsigned>(threads), 0, got.data());
    const auto value = [](int t) { return static_cast<float>(t * 37 % 101) - 200.0f; };
    float most = -kNothing;
    for (int t = 0; t < threads; ++t) most = std::max(most, value(t));
    for (int t = 0; t < threads; ++t) {
      float most_of_8 = -kNothing;
      for (int i = 0; i < 8; ++i) most_of_8 = std::max(most_of_8, value(t / 8 * 8 + i));
      const float want[6] = {static_cast<float>(threads) * static_cast<float>(threads - 1) / 2,
                             static_cast<float>(threads),
                             most,
                             static_cast<float>(t / 4 * 16 + 6),
                             most_of_8,
                             29.0f};
      for (int i = 0; i < 6; ++i) {
        require_equal("value", static_cast<size_t>(t * 6 + i), got[t * 6 + i], want[i]);
      }
    }
  }
});

__global__ void exp2_kernel(const float* g_x, float* g_y) {
  g_y[threadIdx.x] = exp2_approx(g_x[threadIdx.x]);
}

const Register exponentials("exp2_approx to 2 units in the last place", [] {
  Buffer<float> x(1024), y(1024);
  for (size_t i = 0; i < 1024; ++i) x[i] = (static_cast<float>(i) - 512.0f) * 0.2437f;
  x[0] = -INFINITY;
  x[1] = INFINITY;
  x[2] = -127.5f;  // below the normal numbers
  x[3] = 0.0f;
  run_block(exp2_kernel, 1024, 0, x.data(), y.data());
  for (size_t i = 0; i < 4; ++i) require_equal("y", i, y[i], i == 1 ? INFINITY : i == 3 ? 1.0f : 0);
  for (size_t i = 4; i < 1024; ++i) {
    const double want = std::exp2(static_cast<double>(x[i]));
    require(std::fabs(y[i] - want) <= want * ldexp(1.0, -22), "exp2 of " + std::to_string(x[i]));
  }
});

}  // namespace
}  // namespace fastgpt::cases

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  int failed = 0;
  for (const fastgpt::cases::Case& c : fastgpt::cases::all_cases()) {
    if (wanted == "--list") {
      std::puts(c.name.c_str());
    } else if (wanted.empty() || wanted == c.name) {
      try {
#if defined(FASTGPT_EMULATED)
        const fastgpt::emulator::Memory memory;
#endif
        c.run();
      } catch (const std::exception& error) {
        std::printf("%s: %s\n", c.name.c_str(), error.what());
        ++failed;
      }
    }
  }
  return failed == 0 ? 0 : 1;
}

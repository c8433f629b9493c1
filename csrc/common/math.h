// Formulas that host and device share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTGPT_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FASTGPT_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace fastgpt {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// The gradient of a row with a smaller log-sum-exp is 0: it saw no key, or only keys with a bias
// beside which its scores have no digits.
constexpr float kLeastLse = -1e30f;

// A bias in units of log 2. Only -inf hides: what a finite one adds is finite.
FASTGPT_HOST_DEVICE float bias_log2(float bias) {
  constexpr float kMost = 1.7e38f;
  if (bias - bias != 0.0f) return bias;  // infinite, or NaN
  const float scaled = bias * kLog2E;
  return scaled < -kMost ? -kMost : scaled > kMost ? kMost : scaled;
}

struct Philox4 {
  uint32_t word[4];
};

// Philox-4x32-10 (Salmon et al. 2011): four random words for one counter.
FASTGPT_HOST_DEVICE Philox4 philox_4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                        uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// A word below this is dropped: round(p * 2^32).
FASTGPT_HOST_DEVICE uint64_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  const uint64_t floor = static_cast<uint64_t>(scaled);
  const double rest = scaled - static_cast<double>(floor);
  return floor + (rest > 0.5 || (rest == 0.5 && (floor & 1u)) ? 1u : 0u);
}

}  // namespace fastgpt

// What tensor cores make of the 16 bits of an element.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace fastgpt::emulator {

struct HalfTable {
  HalfTable() {
    for (unsigned i = 0; i < 65536; ++i) {
      value[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(i)));
    }
  }
  float value[65536];
};
inline const HalfTable halves;

template <bool kBf16>
float float_of(uint32_t bits) {
  if (!kBf16) return halves.value[bits & 0xffffu];
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace fastgpt::emulator

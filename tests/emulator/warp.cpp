// Collectives of a warp: what each does with the operands of its lanes, by the register layouts of
// the PTX ISA (csrc/cuda/mma.cuh has them).
#include <cfloat>
#include <cmath>
#include <cstring>

#include "tests/emulator/block.h"
#include "tests/emulator/floats.h"

namespace fastgpt::emulator {
namespace {

uint64_t bank_conflicts = 0;

struct ShuffleOperand {
  uint64_t value, result;
  int source;
};

struct LoadOperand {
  uint32_t* r;
  int count;
  bool transposed;
  const void* s_row;
};

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

float float_of_tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// d (16 x 8) += a (16 x kDepth) b (kDepth x 8), the accumulators spread over the lanes.
template <int kDepth>
void multiply_add(void* const* operands, const float (&a)[16][kDepth],
                  const float (&b)[kDepth][8]) {
  typedef float Quarter __attribute__((vector_size(16)));
  for (int row = 0; row < 16; ++row) {
    Quarter low = {}, high = {};
    for (int k = 0; k < kDepth; ++k) {
      Quarter b_low, b_high;
      std::memcpy(&b_low, b[k], sizeof b_low);
      std::memcpy(&b_high, b[k] + 4, sizeof b_high);
      low += a[row][k] * b_low;
      high += a[row][k] * b_high;
    }
    for (int column = 0; column < 8; ++column) {
      const int lane = row % 8 * 4 + column / 2;
      static_cast<MmaOperand*>(operands[lane])->d[row / 8 * 2 + column % 2] +=
          column < 4 ? low[column] : high[column - 4];
    }
  }
}

template <bool kBf16>
void multiply_16_bits(void* const* operands, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    const MmaOperand& o = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][pair * 2 + e + i / 2 * 8] = float_of<kBf16>(o.a[i] >> 16 * e);
      }
      for (int i = 0; i < 2; ++i) {
        b[pair * 2 + e + i * 8][group] = float_of<kBf16>(o.b[i] >> 16 * e);
      }
    }
  }
  multiply_add(operands, a, b);
}

void multiply_tf32(void* const* operands, unsigned) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    const MmaOperand& o = *static_cast<MmaOperand*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + i % 2 * 8][pair + i / 2 * 4] = float_of_tf32(o.a[i]);
    for (int i = 0; i < 2; ++i) b[pair + i * 4][group] = float_of_tf32(o.b[i]);
  }
  multiply_add(operands, a, b);
}

// Eight rows are one pass if their chunks lie in eight different groups of four banks.
void count_conflicts(const uintptr_t (&rows)[8]) {
  int most = 1;
  for (int i = 0; i < 8; ++i) {
    int together = 1;
    for (int j = 0; j < i; ++j) {
      bool again = false;
      for (int k = 0; k < j; ++k) again = again || rows[k] == rows[j];
      together += !again && rows[j] != rows[i] && rows[j] / 16 % 8 == rows[i] / 16 % 8;
    }
    most = together > most ? together : most;
  }
  bank_conflicts += static_cast<uint64_t>(most - 1);
}

void load_all(void* const* operands, unsigned) {
  const LoadOperand& first = *static_cast<LoadOperand*>(operands[0]);
  const unsigned warp = current->warp;
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    uintptr_t rows[8];
    for (int row = 0; row < 8; ++row) {
      const Thread& t = block.thread[warp * kLanes + static_cast<unsigned>(m * 8 + row)];
      const void* s_row = static_cast<LoadOperand*>(operands[m * 8 + row])->s_row;
      read_row(t, s_row, t.pc);
      std::memcpy(matrix[row], s_row, sizeof matrix[row]);
      rows[row] = reinterpret_cast<uintptr_t>(s_row);
    }
    count_conflicts(rows);
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const uint16_t low = first.transposed ? matrix[pair * 2][group] : matrix[group][pair * 2];
      const uint16_t high =
          first.transposed ? matrix[pair * 2 + 1][group] : matrix[group][pair * 2 + 1];
      static_cast<LoadOperand*>(operands[lane])->r[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace

void sync_warp(unsigned mask, Site site) {
  meet("__syncwarp", mask, site, FASTGPT_PC, nullptr,
       [](void* const*, unsigned lanes) { order_lanes(current->warp, lanes); });
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  unsigned operand = predicate;
  meet("a vote", mask, site, FASTGPT_PC, &operand, [](void* const* operands, unsigned lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) votes |= *static_cast<unsigned*>(operands[lane]) << lane;
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) *static_cast<unsigned*>(operands[lane]) = votes;
    }
  });
  return operand;
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
  const Thread& self = *current;
  const int lane = static_cast<int>(self.lane), first = lane / width * width;
  int source = lane;
  switch (kind) {
    case Shuffle::index:
      source = first + (operand & (width - 1));
      break;
    case Shuffle::up:
      source = lane - operand >= first ? lane - operand : lane;
      break;
    case Shuffle::down:
      source = lane + operand < first + width ? lane + operand : lane;
      break;
    case Shuffle::exclusive_or:
      // Lanes of an earlier segment may be read, those of a later one may not.
      source = (lane ^ operand) < first + width ? lane ^ operand : lane;
      break;
  }
  if ((mask >> source & 1) == 0) {
    fail(thread_name(self) + " shuffles at % from lane " + std::to_string(source) +
             ", which does not take part",
         {FASTGPT_PC});
  }
  ShuffleOperand own{value, 0, source};
  meet("a shuffle", mask, site, FASTGPT_PC, &own, [](void* const* operands, unsigned lanes) {
    for (unsigned i = 0; i < kLanes; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      ShuffleOperand& o = *static_cast<ShuffleOperand*>(operands[i]);
      o.result = static_cast<ShuffleOperand*>(operands[o.source])->value;
    }
  });
  return own.result;
}

void load_matrices(uint32_t* r, int count, bool transposed, const void* s_row) {
  LoadOperand own{r, count, transposed, s_row};
  meet("ldmatrix", ~0u, {"", count * 2 + transposed}, FASTGPT_PC, &own, load_all);
}

void mma_16x8x16(float* r_d, const uint32_t* r_a, const uint32_t* r_b, bool bf16) {
  MmaOperand own{r_d, r_a, r_b};
  meet("mma", ~0u, {"", bf16}, FASTGPT_PC, &own,
       bf16 ? multiply_16_bits<true> : multiply_16_bits<false>);
}

void mma_16x8x8_tf32(float* r_d, const uint32_t* r_a, const uint32_t* r_b) {
  MmaOperand own{r_d, r_a, r_b};
  meet("mma of TF32", ~0u, {"", 0}, FASTGPT_PC, &own, multiply_tf32);
}

uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (!std::isfinite(x)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
}

uint64_t take_bank_conflicts() {
  const uint64_t taken = bank_conflicts;
  bank_conflicts = 0;
  return taken;
}

}  // namespace fastgpt::emulator

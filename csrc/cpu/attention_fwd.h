// The forward of one tile of queries, for every layout that has heads: dense, packed, cached.
#pragma once

#include "csrc/cpu/attention_head.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

// Where a head's results go; lo.data null if the rounding error is not wanted.
struct HeadOut {
  Rows out;
  Rows lo;
  float* lse;  // (sq)
};

// Floats of scratch that attend_tile needs.
int64_t attend_scratch(int d);

// Queries [q0, min(q0 + kQueryTile, sq)) of the head.
void attend_tile(const Head& head, const HeadOut& to, int64_t q0, float* scratch);

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

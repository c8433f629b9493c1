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

constexpr int kGroupTiles = kLanes == 16 ? 4 : 16;

// How many tiles of queries one item takes, at most kGroupTiles: more share the loads of k and v,
// fewer keep all threads busy. No bit depends on it.
int group_tiles(const Head& any, int64_t tiles);

// Floats of scratch that attend_tiles needs.
int64_t attend_scratch(int d);

// Up to `tiles` tiles of queries of the head, from query q0 < sq on.
void attend_tiles(const Head& head, const HeadOut& to, int64_t q0, int tiles, float* scratch);

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

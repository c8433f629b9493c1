// Attention of few queries over many keys: the keys are cut into splits, each (unit, split) is one
// item for the threads, and the partial results are merged in ascending order of the splits.
#pragma once

#include "csrc/cpu/attention_fwd.h"
#include "csrc/cpu/parallel.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

constexpr int64_t kSplitQueries = 8;  // up to this many queries take this path
constexpr int kBlockKeys = 64;        // scored together; they stay in L1 until v is added

// The number of splits is a function of the capacity alone: enough of them to spread one head over
// many threads, none so short that merging it costs.
inline int64_t keys_per_split(int64_t capacity) {
  constexpr int64_t kShortest = 256, kMostSplits = 32;
  const int64_t even = ceil_div(capacity, kMostSplits);
  return even > kShortest ? ceil_div(even, kBlockKeys) * kBlockKeys : kShortest;
}

// Floats of one partial result: o (padded(d)) unnormalised, m and l.
inline int64_t partial_floats(int d) {
  return padded(d) + 2;
}

// Floats of scratch that attend_split needs.
int64_t split_scratch(int d, int64_t rows);

// Queries of `group` heads, which share k and v, over the split'th part of the keys that any of
// them sees; partial (group * sq) states.
void attend_split(const Head* heads, int64_t group, int64_t split_keys, int64_t split,
                  float* partial, float* scratch);

// Merges the states of query i of a head, `step` floats apart, into its output row.
void merge_splits(const Head& head, const HeadOut& to, int64_t i, int64_t splits,
                  const float* partial, int64_t step);

// head(unit, g) and out(unit, g) describe query head g of a unit; every head has sq queries.
template <typename HeadOf, typename OutOf>
void split_attention(int64_t units, int64_t group, int64_t sq, int64_t capacity, int d,
                     const HeadOf& head, const OutOf& out) {
  const int64_t split_keys = keys_per_split(capacity);
  const int64_t splits = capacity == 0 ? 1 : ceil_div(capacity, split_keys);
  const int64_t rows = group * sq, step = rows * partial_floats(d);
  const int64_t items = units * splits;
  const int workers = worker_count(items);
  const int64_t heads_bytes = ceil_div(group * static_cast<int64_t>(sizeof(Head)), 64) * 64;
  const Scratch partials(items * step * sizeof(float));
  const WorkerScratch memory(workers, heads_bytes + split_scratch(d, rows) * sizeof(float));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    Head* heads = memory.of<Head>(worker);
    const int64_t unit = item / splits;
    for (int64_t g = 0; g < group; ++g) heads[g] = head(unit, g);
    attend_split(heads, group, split_keys, item % splits, partials.at() + item * step,
                 memory.of(worker, heads_bytes));
  });
  constexpr int64_t kGrainFloats = 16384;  // less is merged sooner than a second thread is there
  parallel_for(units * rows, kGrainFloats / (splits * d) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t unit = item / rows, row = item % rows;
      merge_splits(head(unit, row / sq), out(unit, row / sq), row % sq, splits,
                   partials.at() + unit * splits * step + row * partial_floats(d), step);
    }
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

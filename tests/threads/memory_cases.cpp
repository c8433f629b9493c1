// The memory that results and scratch share between calls.
#include <thread>

#include "csrc/cpu/pages.h"
#include "csrc/cpu/parallel.h"
#include "tests/threads/driver.h"

namespace fastgpt::driver {
namespace {

constexpr int64_t kItems = 1000, kStep = (128 << 10) / sizeof(float);

// Items take blocks of three sizes, at times two, write to them and read what is there: the same
// for every item whose blocks are nobody else's.
void pages(Run& run) {
  const TensorRef sums = run.result("sums", {kItems}, DType::f32);
  float* const out = static_cast<float*>(sums.data);
  parallel_items(kItems, max_threads(), [out](int64_t item, int) {
    const size_t bytes = (2 + item % 3) << 20;
    Pages* const blocks[2] = {take_pages(bytes), item % 2 ? take_pages(bytes) : nullptr};
    float sum = 0.0f;
    for (int which = 0; which < 2; ++which) {
      if (blocks[which] == nullptr) continue;
      float* const floats = static_cast<float*>(blocks[which]->data);
      const int64_t n = static_cast<int64_t>(bytes / sizeof(float));
      const float mine = static_cast<float>(2 * item + which);
      for (int64_t i = 0; i < n; i += kStep) floats[i] = mine;
      std::this_thread::yield();
      for (int64_t i = 0; i < n; i += kStep) sum += floats[i] == mine ? 0.0f : 1.0f;
      keep_pages(blocks[which]);
      std::this_thread::yield();
    }
    out[item] = sum;
  });
}

}  // namespace

std::vector<Case> memory_cases() {
  return {{"pages", pages}};
}

}  // namespace fastgpt::driver

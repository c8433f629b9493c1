// The kernels' threads in the driver: started for each region and joined at its end, so that the
// thread sanitizer knows of no order within a region but the one that the kernels make.
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "csrc/cpu/parallel.h"
#include "tests/threads/driver.h"

namespace fastgpt {
namespace {

int threads_wanted = 1;
int most_used = 0;

}  // namespace

int max_threads() {
  return threads_wanted;
}

void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t threads = std::min<int64_t>(threads_wanted, (n + grain - 1) / grain);
  const int64_t each = (n + threads - 1) / threads;
  std::atomic<int64_t> missing{threads};
  const auto work = [&](int64_t thread) {
    // The first to arrive could empty the queue of items alone, and a race needs two.
    --missing;
    while (missing > 0) std::this_thread::yield();
    const int64_t begin = thread * each;
    if (begin < n) body(begin, std::min(n, begin + each), context);
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  most_used = std::max(most_used, static_cast<int>((n + each - 1) / each));
}

namespace driver {

void set_threads(int threads) {
  threads_wanted = threads;
  most_used = 0;
}

int threads_used() {
  return most_used;
}

}  // namespace driver
}  // namespace fastgpt

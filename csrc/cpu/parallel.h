// Threads for the CPU kernels. How work is cut never decides a result's bits: every item is
// computed by one thread, in an order of its own, and partial sums belong to items, not to threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "csrc/common/dispatch.h"
#include "csrc/cpu/pages.h"

namespace fastgpt {

// Supplied by whoever links the kernels: torch's thread pool, or std::thread in the test driver.
// body is called with disjoint ranges that cover [0, n), on up to max_threads() threads.
void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
int max_threads();

inline namespace FASTGPT_ISA {

// f(begin, end) on ranges of at least grain items. f must not throw.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) return f(int64_t{0}, n);
  run_parallel(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(item, worker) for every item, handed out one by one in ascending order; worker is in
// [0, workers) and names the scratch that the call may use. f must not throw.
template <typename F>
void parallel_items(int64_t n, int workers, const F& f) {
  int64_t next = 0;
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t item; (item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < n;) {
        f(item, static_cast<int>(worker));
      }
    }
  });
}

// f(begin, end, worker) on one range of [0, n) for each worker: where items are alike, so that
// neighbours, whose results share cache lines, are mostly of one thread. f must not throw.
template <typename F>
void parallel_ranges(int64_t n, int workers, const F& f) {
  parallel_for(workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      f(n * worker / workers, n * (worker + 1) / workers, static_cast<int>(worker));
    }
  });
}

// How many workers may be used for n items, of which fewer than grain do not pay for another one.
inline int worker_count(int64_t n, int64_t grain = 1) {
  const int threads = max_threads();
  const int64_t most = (n + grain - 1) / grain;
  return most < threads ? static_cast<int>(most) : threads;
}

// The scratch of one call: one allocation, aligned to a cache line; none for 0 bytes.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : pages_(take_pages(bytes)), data_(nullptr) {
    if (pages_ != nullptr) {
      data_ = pages_->data;
    } else if (bytes > 0) {
      data_ = ::operator new(bytes, std::align_val_t{64});
    }
  }
  ~Scratch() {
    if (pages_ != nullptr) {
      keep_pages(pages_);
    } else if (data_ != nullptr) {
      ::operator delete(data_, std::align_val_t{64});
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T = float>
  T* at(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  Pages* pages_;
  void* data_;
};

// As much scratch for each worker, none of it on a cache line of another's or on the one beside it,
// which is fetched along.
class WorkerScratch {
 public:
  WorkerScratch(int workers, size_t bytes)
      : bytes_((bytes + 127) / 128 * 128), all_(workers * bytes_) {}

  template <typename T = float>
  T* of(int worker, size_t byte_offset = 0) const {
    return all_.at<T>(worker * bytes_ + byte_offset);
  }

 private:
  size_t bytes_;
  Scratch all_;
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

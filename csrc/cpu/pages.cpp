// Learnt: on huge pages softmax's backward of (1024, 768) takes 0.8 of its time in scattered small
// ones; a block of 32 MiB whose pages are new costs 10 to 80 ms, an old one 1.3.
#include "csrc/cpu/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

namespace fastgpt {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kHugePage = 2 * kMiB;
constexpr size_t kSmallest = kHugePage / 4 * 3;
// Of the blocks kept, so much of the newest is left alone: to offer a block to the system costs 5
// to 20 us a MiB, for the other cores must forget its pages too.
constexpr size_t kHot = 256 * kMiB;

constexpr uintptr_t round_up(uintptr_t n, size_t unit) {
  return (n + unit - 1) / unit * unit;
}

// The largest block that is given out for so many bytes.
constexpr size_t most_for(size_t bytes) {
  return bytes + bytes / 3;
}

size_t system_value(int name) {
  return static_cast<size_t>(std::max(sysconf(name), 1L));
}

// Whole huge pages where the block may have them, and advice to use them, which a system without
// any refuses.
size_t size_of_new(size_t bytes) {
  const size_t huge = round_up(bytes, kHugePage);
  return huge <= most_for(bytes) ? huge : round_up(bytes, system_value(_SC_PAGESIZE));
}

void* map(size_t bytes) {
  void* all =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  const auto begin = reinterpret_cast<uintptr_t>(all);
  const uintptr_t data = round_up(begin, kHugePage);
  const size_t before = data - begin;
  if (before > 0) munmap(all, before);
  munmap(reinterpret_cast<void*>(data + bytes), kHugePage - before);
  (void)madvise(reinterpret_cast<void*>(data), bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
  return reinterpret_cast<void*>(data);
}

void unmap(Pages* pages) {
  munmap(pages->data, pages->bytes);
  delete pages;
}

// glibc's heap keeps the pages of blocks up to the size of the largest that was ever mapped and
// freed, at most 32 MiB. This puts the bound there at once, and touches nothing.
bool raise_mmap_threshold() {
  void* volatile block = std::malloc(32 * kMiB - 64 * 1024);
  std::free(block);
  return true;
}

// Ops never wait for the lock: a child of fork may find it held by a thread that it does not have.
class Keeper {
 public:
  Pages* take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    Pages* pages = take_kept(bytes);
    if (pages == nullptr) {
      const size_t size = size_of_new(bytes), used = size + in_use_.load(std::memory_order_relaxed);
      drop_until(most_used_ > used ? most_used_ - used : 0);
      void* data = map(size);
      if (data == nullptr) return nullptr;
      pages = new Pages{data, size};
    }
    const size_t before = in_use_.fetch_add(pages->bytes, std::memory_order_relaxed);
    most_used_ = std::max(most_used_, before + pages->bytes);
    return pages;
  }

  size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = kept_;
    drop_until(0);
    return bytes;
  }

  void keep(Pages* pages) {
    in_use_.fetch_sub(pages->bytes, std::memory_order_relaxed);
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return unmap(pages);
    blocks_.push_back({pages, false});
    kept_ += pages->bytes;
    drop_until(system_value(_SC_PHYS_PAGES) / 8 * system_value(_SC_PAGESIZE));
    offer_cold();
  }

 private:
  struct Block {
    Pages* pages;
    bool offered;  // the system may have its pages
  };

  // The smallest that fits, of several the newest.
  Pages* take_kept(size_t bytes) {
    size_t best = blocks_.size();
    for (size_t i = blocks_.size(); i-- > 0;) {
      const size_t size = blocks_[i].pages->bytes;
      if (size < bytes || size > most_for(bytes)) continue;
      if (best == blocks_.size() || size < blocks_[best].pages->bytes) best = i;
    }
    if (best == blocks_.size()) return nullptr;
    Pages* pages = blocks_[best].pages;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
    kept_ -= pages->bytes;
    return pages;
  }

  // The oldest first.
  void drop_until(size_t most_kept) {
    size_t n = 0;
    for (; kept_ > most_kept; ++n) {
      kept_ -= blocks_[n].pages->bytes;
      unmap(blocks_[n].pages);
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + static_cast<std::ptrdiff_t>(n));
  }

  void offer_cold() {
    size_t newer = 0;
    for (size_t i = blocks_.size(); i-- > 0;) {
      const Pages& pages = *blocks_[i].pages;
      newer += pages.bytes;
      if (newer <= kHot || blocks_[i].offered) continue;
      (void)madvise(pages.data, pages.bytes, MADV_FREE);
      blocks_[i].offered = true;
    }
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // the oldest first
  size_t kept_ = 0;            // bytes of blocks_
  size_t most_used_ = 0;       // bytes in use at once so far
  std::atomic<size_t> in_use_{0};
};

// Never destroyed: tensors may outlive whatever the process destroys at its end.
Keeper& keeper() {
  static Keeper& the = *new Keeper;
  return the;
}

}  // namespace

Pages* take_pages(size_t bytes) {
  constexpr size_t kFirstThreshold = 128 * 1024;
  if (bytes < kFirstThreshold) return nullptr;
  [[maybe_unused]] static const bool raised = raise_mmap_threshold();
  return bytes < kSmallest ? nullptr : keeper().take(bytes);
}

void keep_pages(Pages* pages) {
  keeper().keep(pages);
}

size_t release_pages() {
  return keeper().release();
}

}  // namespace fastgpt

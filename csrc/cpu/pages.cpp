#include "csrc/cpu/pages.h"

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgpt {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

// glibc serves blocks from its heap, where they keep their pages, up to the size of the largest
// block that was ever mapped and freed, at most 32 MiB. This puts the bound there at once, and
// touches nothing.
bool raise_mmap_threshold() {
  void* volatile block = std::malloc(32 * kMiB - 64 * 1024);
  std::free(block);
  return true;
}

}  // namespace

void prepare_pages(void* data, size_t bytes) {
  constexpr uintptr_t kHugePage = 2 * kMiB;
  if (bytes < kMiB) return;
  [[maybe_unused]] static const bool raised = raise_mmap_threshold();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (address + bytes) & ~(kHugePage - 1);
  // Advice only: a system without huge pages refuses, and the memory is as good as before.
  if (bytes >= 2 * kHugePage)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
#endif
}

}  // namespace fastgpt

// The pages of large results and scratch. The system zeroes a page when it is first written, at 0.5
// to 3 GB/s where kernels write 30, and glibc gives blocks of over 32 MiB back to the system as
// soon as they are freed. So large blocks are kept here, and given out again with their pages.
#pragma once

#include <cstddef>

namespace fastgpt {

// A block of memory; its address is a multiple of 2 MiB.
struct Pages {
  void* data;
  size_t bytes;
};

// A block of at least `bytes` bytes, with whatever was last written to it. Null where the usual
// allocator does as well (below 1.5 MiB), or the system has none to give. From any thread.
Pages* take_pages(size_t bytes);

// Keeps the block for a later take_pages. What is kept and what is in use are together never more
// than was in use at once before, and what is kept is at most an eighth of the machine's memory,
// of which the system may take back all but the newest 256 MiB whenever it needs memory.
void keep_pages(Pages* pages);

// Gives all that is kept back to the system; returns its bytes.
size_t release_pages();

}  // namespace fastgpt

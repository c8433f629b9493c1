// The stacks of a block's threads, and the switch from one to another.
#include <sys/mman.h>

#include <new>

#include "tests/emulator/block.h"

// Saves what a callee must keep, and the stack pointer in *save; goes on where `to` was saved.
asm(R"(
  .text
  .globl fastgpt_emulator_switch
  .hidden fastgpt_emulator_switch
  .type fastgpt_emulator_switch, @function
fastgpt_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastgpt_emulator_switch, . - fastgpt_emulator_switch
)");

namespace fastgpt::emulator {
namespace {

constexpr size_t kGuardBytes = 4096;

unsigned char* map_stacks() {
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  unsigned char* stacks = static_cast<unsigned char*>(memory);
  for (unsigned i = 0; i < kMaxThreads; ++i) {
    mprotect(stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  }
  return stacks;
}

unsigned char* stacks() {
  static unsigned char* const memory = map_stacks();
  return memory;
}

}  // namespace

void* fresh_stack(unsigned thread, void (*entry)()) {
  // Staggered: tops a power of two apart would share the same few sets of the cache.
  unsigned char* top = stacks() + (thread + 1) * kStackBytes - thread % 32 * 128;
  void** slot = reinterpret_cast<void**>(top) - 2;
  slot[0] = reinterpret_cast<void*>(entry);  // returned to; leaves the stack as after a call
  slot[1] = nullptr;
  return slot - 6;
}

bool on_stacks(const void* address) {
  const unsigned char* a = static_cast<const unsigned char*>(address);
  return a >= stacks() && a < stacks() + kMaxThreads * kStackBytes;
}

}  // namespace fastgpt::emulator

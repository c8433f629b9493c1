// Inside the emulator: the running block, its threads, and what its parts ask of one another.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "tests/emulator/emulator.h"

namespace fastgpt::emulator {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // of sm_90, with all that a block may opt in to
constexpr size_t kStackBytes = 128 * 1024;

struct AsyncCopy {
  unsigned char* s_to;
  const unsigned char* g_from;
  int bytes;
  unsigned group;
  const void* pc;
};

// A fence_shared(): when it was called.
struct Fence {
  uint64_t barrier;
  uint32_t clock;
};

struct Thread {
  enum State { ready, waiting, done };

  void* stack_pointer;
  unsigned id, warp, lane;
  uint3 index;
  State state;
  const char* collective;  // what it waits for, where, with which lanes, and what it brings
  Site site;
  const void* pc;
  unsigned mask;
  void* operand;
  std::vector<AsyncCopy> copies;
  unsigned group;  // the number that the next commit gives
  std::vector<Fence> fences;
};

struct Block {
  dim3 grid, size;
  uint3 index;
  unsigned threads, warps;
  Thread thread[kMaxThreads];
};

extern Block block;
extern __thread Thread* current __attribute__((tls_model("initial-exec")));

#define FASTGPT_PC __builtin_extract_return_addr(__builtin_return_address(0))

// ---- block.cpp: who runs ----

// Waits until all lanes of `mask` are here; the last to come runs all(operands by lane, mask).
void meet(const char* collective, unsigned mask, Site site, const void* pc, void* operand,
          void (*all)(void* const* operands, unsigned mask));

// Ends the launch. Each "%" of the text becomes the source position of the next pc.
[[noreturn]] void fail(std::string text, std::initializer_list<const void*> pcs);
std::string thread_name(const Thread& t);

// ---- memory.cpp: who may touch what ----

void begin_block(size_t dynamic_bytes, const void* arguments, size_t argument_bytes);
void order_block();                              // what came before is known to every thread
void order_lanes(unsigned warp, unsigned mask);  // ... of these lanes, to these lanes
void read_row(const Thread& t, const void* s_row, const void* pc);  // for its whole warp
void require_shared(const Thread& t, const void* s_address, const char* what, const void* pc);
// A wgmma of the warp reads a chunk, and nobody may write there, from its issue to the wait for it.
void begin_reading(const Thread& t, const void* s_chunk, const void* pc);
void end_reading(const Thread& t, const void* s_chunk, const void* pc);
void check_no_copies(const Thread& t);
void touch(const void* address, size_t bytes, bool write, const void* pc);

// ---- wgmma.cpp ----

void begin_products();
void check_no_products(const Thread& t);

// ---- stacks.cpp ----

// The stack of a thread, ready to be switched to: it begins in entry().
void* fresh_stack(unsigned thread, void (*entry)());
bool on_stacks(const void* address);
extern "C" void fastgpt_emulator_switch(void** save, void* to);

// ---- report.cpp ----

// "file:line < file:line of the caller it is inlined into", as far as it can be found out.
std::string source_of(const void* pc);

}  // namespace fastgpt::emulator

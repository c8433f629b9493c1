// Who runs: the threads of the one running block, barriers, and collectives of a warp.
#include "tests/emulator/block.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "csrc/cuda/arch.h"

namespace fastgpt::emulator {

Block block;
__thread Thread* current = nullptr;

namespace {

// Lanes of a warp on their way into one collective.
struct Gathering {
  unsigned mask, arrived;
  unsigned first;  // thread
};

struct Warp {
  unsigned ready;
  unsigned gatherings;
  Gathering gathering[kLanes];
};

Warp warp_of[kMaxThreads / kLanes];
unsigned ready_warps;
unsigned running;   // threads that have not returned
unsigned arrived;   // at the barrier of the block
unsigned agreeing;  // of these, those whose predicate holds

void* host_stack;
void (*kernel_of_block)(void*);
void* arguments_of_kernel;
std::string failure;
std::vector<const void*> failure_pcs;

int capability = 80;
unsigned schedule = 0;
uint64_t random_state;

uint64_t draw() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// One of the bits that are set, as the schedule likes it.
unsigned choose(unsigned bits) {
  if (schedule == 0) return static_cast<unsigned>(__builtin_ctz(bits));
  if (schedule == 1) return 31u - static_cast<unsigned>(__builtin_clz(bits));
  const unsigned turn = draw() % 32;
  const uint64_t twice = bits | static_cast<uint64_t>(bits) << 32;
  return (static_cast<unsigned>(__builtin_ctzll(twice >> turn)) + turn) % 32;
}

void set_ready(unsigned warp, unsigned lanes) {
  warp_of[warp].ready |= lanes;
  ready_warps |= 1u << warp;
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    block.thread[warp * kLanes + static_cast<unsigned>(__builtin_ctz(rest))].state = Thread::ready;
  }
}

void not_ready(Thread& t, Thread::State state) {
  t.state = state;
  warp_of[t.warp].ready &= ~(1u << t.lane);
  if (warp_of[t.warp].ready == 0) ready_warps &= ~(1u << t.warp);
}

// "threads 0-30, 63", of those that are as thread `like` is.
std::string threads_like(const Thread& like) {
  const auto same = [&](const Thread& t) {
    return t.state == like.state && (t.state == Thread::done || t.pc == like.pc);
  };
  std::string text;
  for (unsigned i = 0; i < block.threads; ++i) {
    if (!same(block.thread[i])) continue;
    unsigned last = i;
    while (last + 1 < block.threads && same(block.thread[last + 1])) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(i);
    if (last > i) text += "-" + std::to_string(last);
    i = last;
  }
  return text;
}

[[noreturn]] void report_deadlock() {
  std::string text = "deadlock";
  const void* pcs[4] = {};
  unsigned places = 0;
  bool returned = false;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Thread& t = block.thread[i];
    bool known = t.state == Thread::done ? returned : places == 4;
    for (unsigned p = 0; t.state != Thread::done && p < places; ++p) known |= pcs[p] == t.pc;
    if (known) continue;
    text += "; threads " + threads_like(t);
    if (t.state == Thread::done) {
      text += " have returned";
      returned = true;
    } else {
      text += " wait in " + std::string(t.collective) + " at %";
      pcs[places++] = t.pc;
    }
  }
  fail(text, {pcs[0], pcs[1], pcs[2], pcs[3]});
}

void run_next() {
  Thread& self = *current;
  if (ready_warps == 0) report_deadlock();
  const unsigned warp = choose(ready_warps);
  Thread& next = block.thread[warp * kLanes + choose(warp_of[warp].ready)];
  if (&next == &self) return;
  current = &next;
  fastgpt_emulator_switch(&self.stack_pointer, next.stack_pointer);
}

void leave_block() {
  Thread& self = *current;
  current = nullptr;
  fastgpt_emulator_switch(&self.stack_pointer, host_stack);
}

void run_thread() {
  kernel_of_block(arguments_of_kernel);
  Thread& self = *current;
  check_no_copies(self);
  check_no_products(self);
  not_ready(self, Thread::done);
  if (--running == 0) leave_block();
  run_next();
}

void wait_as(const char* collective, Site site, const void* pc, unsigned mask, void* operand) {
  Thread& self = *current;
  not_ready(self, Thread::waiting);
  self.collective = collective;
  self.site = site;
  self.pc = pc;
  self.mask = mask;
  self.operand = operand;
}

void require_same(const Thread& first, const Thread& second) {
  const auto equal = [](const char* a, const char* b) { return a == b || !std::strcmp(a, b); };
  if (first.mask == second.mask && first.site.line == second.site.line &&
      equal(first.site.file, second.site.file) && equal(first.collective, second.collective)) {
    return;
  }
  char masks[64];
  std::snprintf(masks, sizeof masks, " (lanes 0x%08x and 0x%08x)", first.mask, second.mask);
  fail(thread_name(first) + " waits in " + first.collective + " at %, " + thread_name(second) +
           " comes to " + second.collective + " at %" + masks,
       {first.pc, second.pc});
}

void run_block(uint3 index, size_t shared_bytes, size_t argument_bytes) {
  block.index = index;
  begin_block(shared_bytes, arguments_of_kernel, argument_bytes);
  begin_products();
  running = block.threads;
  arrived = agreeing = ready_warps = 0;
  for (unsigned w = 0; w < block.warps; ++w) warp_of[w].ready = warp_of[w].gatherings = 0;
  for (unsigned i = 0; i < block.threads; ++i) {
    Thread& t = block.thread[i];
    t.id = i;
    t.warp = i / kLanes;
    t.lane = i % kLanes;
    t.index = {i % block.size.x, i / block.size.x % block.size.y,
               i / (block.size.x * block.size.y)};
    t.stack_pointer = fresh_stack(i, run_thread);
    t.group = 0;
    t.copies.clear();
    t.fences.clear();
    set_ready(t.warp, 1u << t.lane);
  }
  const unsigned warp = choose(ready_warps);
  current = &block.thread[warp * kLanes + choose(warp_of[warp].ready)];
  fastgpt_emulator_switch(&host_stack, current->stack_pointer);
}

unsigned next_schedule = 0;

void take_schedule() {
  const char* fixed = std::getenv("FASTGPT_EMULATOR_SCHEDULE");
  schedule = fixed != nullptr ? static_cast<unsigned>(std::atoi(fixed)) : next_schedule++;
  random_state = 0x9e3779b97f4a7c15u * (schedule + 1u);
}

void require(bool holds, const char* what, size_t value) {
  if (holds) return;
  throw std::runtime_error(std::string("emulator: ") + what + ", got " + std::to_string(value));
}

}  // namespace

void fail(std::string text, std::initializer_list<const void*> pcs) {
  failure = std::move(text) + " [block (" + std::to_string(block.index.x) + ", " +
            std::to_string(block.index.y) + ", " + std::to_string(block.index.z) +
            "); FASTGPT_EMULATOR_SCHEDULE=" + std::to_string(schedule) + " repeats it]";
  failure_pcs.assign(pcs);
  leave_block();
  __builtin_unreachable();
}

std::string thread_name(const Thread& t) {
  return "thread " + std::to_string(t.id);
}

int compute_capability() {
  return capability;
}

void set_compute_capability(int wanted) {
  capability = wanted;
}

void set_schedule(unsigned wanted) {
  next_schedule = wanted;
}

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, void (*kernel)(void*), void* arguments,
              size_t argument_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const size_t threads = size_t{size.x} * size.y * size.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  require(threads >= 1 && threads <= kMaxThreads, "a block has 1 to 1024 threads", threads);
  require(size.z <= 64, "a block has up to 64 threads in z", size.z);
  require(blocks >= 1, "a grid has at least one block", blocks);
  require(grid.x <= 0x7fffffffu, "a grid has up to 2^31 - 1 blocks in x", grid.x);
  require(grid.y <= 65535 && grid.z <= 65535, "a grid has up to 65535 blocks in y and z",
          grid.y > grid.z ? grid.y : grid.z);
  require(shared_bytes + cuda::kStaticSharedBytes <= block_shared_bytes(),
          "a block has up to 162 or 226 KiB of dynamic shared memory", shared_bytes);
  take_schedule();
  block.grid = grid;
  block.size = size;
  block.threads = static_cast<unsigned>(threads);
  block.warps = (block.threads + kLanes - 1) / kLanes;
  kernel_of_block = kernel;
  arguments_of_kernel = arguments;
  failure.clear();
  size_t step = schedule < 2 ? 1 : draw() % blocks + 1;
  while (std::gcd(step, blocks) != 1) ++step;
  for (size_t i = 0; i < blocks && failure.empty(); ++i) {
    const size_t b = schedule == 1 ? blocks - 1 - i : i * step % blocks;
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / grid.x / grid.y)},
              shared_bytes, argument_bytes);
  }
  if (failure.empty()) return;
  for (unsigned i = 0; i < block.threads; ++i) block.thread[i].copies.clear();
  std::string text = "emulator: ";
  size_t next = 0;
  for (const char c : failure) {
    if (c == '%' && next < failure_pcs.size()) {
      text += source_of(failure_pcs[next++]);
    } else {
      text += c;
    }
  }
  throw std::runtime_error(text);
}

void meet(const char* collective, unsigned mask, Site site, const void* pc, void* operand,
          void (*all)(void* const* operands, unsigned mask)) {
  Thread& self = *current;
  const unsigned bit = 1u << self.lane;
  if ((mask & bit) == 0) {
    fail(thread_name(self) + " is not among the lanes of its own " + collective + " at %", {pc});
  }
  wait_as(collective, site, pc, mask, operand);
  Warp& warp = warp_of[self.warp];
  unsigned g = 0;
  while (g < warp.gatherings && (warp.gathering[g].mask & mask) == 0) ++g;
  if (g == warp.gatherings) {
    warp.gathering[warp.gatherings++] = {mask, 0, self.id};
  } else {
    require_same(block.thread[warp.gathering[g].first], self);
  }
  warp.gathering[g].arrived |= bit;
  if (warp.gathering[g].arrived != mask) return run_next();
  void* operands[kLanes];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    operands[lane] =
        (mask >> lane & 1) == 0 ? nullptr : block.thread[self.warp * kLanes + lane].operand;
  }
  warp.gathering[g] = warp.gathering[--warp.gatherings];
  all(operands, mask);
  set_ready(self.warp, mask);
  if (schedule >= 2) run_next();
}

int sync_threads(Vote vote, bool predicate, Site site) {
  // All threads of the block, those that have returned too: a kernel that does not wait for them
  // relies on what only newer GPUs do.
  Thread& self = *current;
  static unsigned first;
  static int result;
  if (arrived == 0) first = self.id;
  wait_as("__syncthreads", site, FASTGPT_PC, ~0u, nullptr);
  require_same(block.thread[first], self);
  agreeing += predicate;
  if (++arrived < block.threads) {
    run_next();
  } else {
    result = vote == Vote::count ? static_cast<int>(agreeing)
             : vote == Vote::any ? agreeing > 0
                                 : agreeing == block.threads;
    arrived = agreeing = 0;
    order_block();
    for (unsigned w = 0; w < block.warps; ++w) {
      const unsigned lanes = block.threads - w * kLanes;
      set_ready(w, lanes >= kLanes ? ~0u : (1u << lanes) - 1);
    }
    if (schedule >= 2) run_next();
  }
  return result;
}

uint3 thread_index() {
  return current->index;
}

uint3 block_index() {
  return block.index;
}

uint3 block_size() {
  return {block.size.x, block.size.y, block.size.z};
}

uint3 grid_dimensions() {
  return {block.grid.x, block.grid.y, block.grid.z};
}

void trap() {
  fail(thread_name(*current) + " traps at %", {FASTGPT_PC});
}

}  // namespace fastgpt::emulator

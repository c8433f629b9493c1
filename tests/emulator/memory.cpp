// Who may touch what: shared memory, byte by byte, is unwritten, written, or on its way from a
// cp.async, and remembers who touched it since the last barrier of the block; global memory is what
// the host allowed. Threads know of one another by vector clocks: a thread's own clock advances
// whenever others learn of it, and an access is ordered before another if its thread's clock then
// is known to the other's thread.
#include <link.h>

#include <algorithm>
#include <bitset>
#include <cstring>

#include "csrc/cuda/arch.h"
#include "tests/emulator/block.h"

namespace fastgpt::emulator {
namespace {

constexpr size_t kRedZone = 256;  // between arrays
constexpr size_t kMaxArrays = 32;
constexpr size_t kArenaBytes = kMaxSharedBytes + kMaxArrays * 2 * kRedZone;
constexpr size_t kChunk = 16;
constexpr unsigned char kPoison = 0xff;  // NaN in every float dtype

struct Access {
  uint16_t bytes;  // of the chunk
  uint16_t thread;
  uint32_t clock;
  uint32_t fences;  // that the thread had called
  const void* pc;
};

struct Chunk {
  uint64_t block = 0, barrier = 0;  // when it was last used
  uint16_t written = 0, in_flight = 0;
  uint32_t products = 0;  // of warps, that read it now
  const void *copy_pc = nullptr, *product_pc = nullptr;
  std::vector<Access> stores;  // the last to each byte
  // Since the barrier; later ones do not replace what they overlap.
  std::vector<Access> writes, reads;
  std::bitset<kMaxThreads> has_read;  // who is in `reads`
};

struct Array {
  const void* tag;
  size_t begin, end;
};

struct Range {
  const unsigned char* begin;
  const unsigned char* end;
};

alignas(1024) unsigned char arena[kArenaBytes];
Chunk chunks[kArenaBytes / kChunk];
Array arrays[kMaxArrays];
size_t array_count, arena_used;
Range arguments;
uint64_t block_number = 0, barrier_number = 0;
uint32_t known[kMaxThreads][kMaxThreads];  // [t][u]: the clock of u that t knows of
thread_local std::vector<Range> allowed;

// What the library itself consists of: constants of a kernel, which it may read.
Range find_image() {
  Range image{};
  const auto look = [](dl_phdr_info* info, size_t, void* data) {
    const unsigned char* base = reinterpret_cast<unsigned char*>(info->dlpi_addr);
    const unsigned char *begin = nullptr, *end = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      if (begin == nullptr) begin = base + info->dlpi_phdr[i].p_vaddr;
      end = base + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz;
    }
    if (begin == nullptr || arena < begin || arena >= end) return 0;
    *static_cast<Range*>(data) = {begin, end};
    return 1;
  };
  dl_iterate_phdr(look, &image);
  return image;
}

std::string hex(const void* address) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", address);
  return text;
}

std::string bytes_at(size_t bytes, size_t offset) {
  for (size_t i = 0; i < array_count; ++i) {
    if (offset < arrays[i].begin || offset >= arrays[i].end) continue;
    return std::to_string(bytes) + " bytes at offset " + std::to_string(offset - arrays[i].begin) +
           " of " + (arrays[i].tag == nullptr ? "dynamic" : "an array in") + " shared memory (" +
           std::to_string(arrays[i].end - arrays[i].begin) + " bytes)";
  }
  return std::to_string(bytes) + " bytes outside of every shared array";
}

Chunk& chunk_at(size_t offset) {
  Chunk& chunk = chunks[offset / kChunk];
  if (chunk.block != block_number) {
    chunk.block = block_number;
    chunk.written = chunk.in_flight = 0;
    chunk.products = 0;
    chunk.stores.clear();
  }
  if (chunk.barrier != barrier_number) {
    chunk.barrier = barrier_number;
    chunk.writes.clear();
    chunk.reads.clear();
    chunk.has_read.reset();
  }
  return chunk;
}

uint16_t bytes_of_chunk(size_t begin, size_t end) {
  return static_cast<uint16_t>(((1u << (end - begin)) - 1) << begin % kChunk);
}

bool is_ordered(const Access& before, const Thread& t, bool whole_warp) {
  if (!whole_warp) return before.thread == t.id || known[t.id][before.thread] >= before.clock;
  for (unsigned i = t.warp * kLanes; i < (t.warp + 1) * kLanes; ++i) {
    if (before.thread != i && known[i][before.thread] < before.clock) return false;
  }
  return true;
}

void forget(std::vector<Access>& list, uint16_t bytes) {
  for (Access& a : list) a.bytes = static_cast<uint16_t>(a.bytes & ~bytes);
  const auto empty = [](const Access& a) { return a.bytes == 0; };
  list.erase(std::remove_if(list.begin(), list.end(), empty), list.end());
}

void remember(Chunk& chunk, const Thread& t, uint16_t bytes, bool write, const void* pc) {
  const uint32_t clock = known[t.id][t.id];
  const Access access{bytes, static_cast<uint16_t>(t.id), clock,
                      static_cast<uint32_t>(t.fences.size()), pc};
  if (write) {
    // Everything that it overlaps is ordered before it, so that it stands for all of that.
    forget(chunk.writes, bytes);
    forget(chunk.reads, bytes);
    chunk.written |= bytes;
    chunk.writes.push_back(access);
    forget(chunk.stores, bytes);
    chunk.stores.push_back(access);
    return;
  }
  if (chunk.has_read[t.id]) {
    // What comes after this read comes after the thread's earlier ones too.
    for (Access& a : chunk.reads) {
      if (a.thread != t.id || (a.clock != clock && (a.bytes & ~bytes) != 0)) continue;
      a = {static_cast<uint16_t>(a.bytes | bytes), a.thread, clock, access.fences, pc};
      return;
    }
  }
  chunk.has_read[t.id] = true;
  chunk.reads.push_back(access);
}

enum class Kind { read, read_by_warp, write, copy_issued, copy_landed };

// Reports the first of these accesses that nothing orders before one of the bytes [begin, end).
void require_ordered(const std::vector<Access>& list, bool writes, const Thread& t, size_t begin,
                     size_t end, Kind kind, const void* pc) {
  const uint16_t bytes = bytes_of_chunk(begin, end);
  for (const Access& before : list) {
    if ((before.bytes & bytes) == 0 || is_ordered(before, t, kind == Kind::read_by_warp)) continue;
    const bool reads = kind == Kind::read || kind == Kind::read_by_warp;
    fail("race: " + thread_name(t) + (reads ? " reads " : " writes ") +
             bytes_at(end - begin, begin) + " at %, thread " + std::to_string(before.thread) +
             (writes ? " wrote" : " read") + " there at %, and nothing orders the two",
         {pc, before.pc});
  }
}

void touch_chunk(const Thread& t, size_t begin, size_t end, Kind kind, const void* pc) {
  Chunk& chunk = chunk_at(begin);
  const uint16_t bytes = bytes_of_chunk(begin, end);
  const bool write = kind != Kind::read && kind != Kind::read_by_warp;
  if (chunk.in_flight & bytes && kind != Kind::copy_landed) {
    fail(thread_name(t) + (write ? " writes " : " reads ") + bytes_at(end - begin, begin) +
             " at %, where a copy of % is still in flight",
         {pc, chunk.copy_pc});
  }
  if (write && chunk.products > 0) {
    fail(thread_name(t) + " writes " + bytes_at(end - begin, begin) +
             " at %, which a product of % still reads",
         {pc, chunk.product_pc});
  }
  if (!write && (bytes & ~chunk.written)) {
    fail(thread_name(t) + " reads " + bytes_at(end - begin, begin) + " at %, which nobody wrote",
         {pc});
  }
  require_ordered(chunk.writes, true, t, begin, end, kind, pc);
  if (write) require_ordered(chunk.reads, false, t, begin, end, kind, pc);
  if (kind == Kind::copy_issued) {
    chunk.in_flight |= bytes;
    chunk.copy_pc = pc;
    return;
  }
  if (kind == Kind::copy_landed) chunk.in_flight = static_cast<uint16_t>(chunk.in_flight & ~bytes);
  remember(chunk, t, bytes, write, pc);
}

// The array that holds [offset, offset + bytes), or a report.
void touch_shared(const Thread& t, size_t offset, size_t bytes, Kind kind, const void* pc) {
  size_t i = 0;
  while (i < array_count && (offset < arrays[i].begin || offset + bytes > arrays[i].end)) ++i;
  if (i == array_count) {
    const bool write = kind != Kind::read && kind != Kind::read_by_warp;
    fail(thread_name(t) + (write ? " writes " : " reads ") +
             "out of bounds at %: " + bytes_at(bytes, offset),
         {pc});
  }
  for (size_t at = offset; at < offset + bytes;) {
    const size_t end = std::min(at / kChunk * kChunk + kChunk, offset + bytes);
    touch_chunk(t, at, end, kind, pc);
    at = end;
  }
}

bool in_shared(const void* address) {
  return address >= arena && address < arena + kArenaBytes;
}

size_t offset_of(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - arena);
}

bool within(const Range& range, const unsigned char* begin, size_t bytes) {
  return begin >= range.begin && begin + bytes <= range.end;
}

void touch_global(const Thread& t, const void* address, size_t bytes, bool write, const void* pc) {
  static const Range image = find_image();
  const unsigned char* begin = static_cast<const unsigned char*>(address);
  for (const Range& range : allowed) {
    if (within(range, begin, bytes)) return;
  }
  if (!write && (within(arguments, begin, bytes) || within(image, begin, bytes))) return;
  std::string where = hex(address) + ", near no tensor";
  ptrdiff_t nearest = 65536;
  for (const Range& range : allowed) {
    const ptrdiff_t before = range.begin - begin;
    const ptrdiff_t past = begin + static_cast<ptrdiff_t>(bytes) - range.end;
    const ptrdiff_t distance = std::max(before, past);
    if (distance >= nearest) continue;
    nearest = distance;
    where = std::to_string(distance) + (before > past ? " bytes before" : " bytes past") +
            " a tensor of " + std::to_string(range.end - range.begin) + " bytes";
  }
  fail(thread_name(t) + (write ? " writes " : " reads ") + std::to_string(bytes) +
           " bytes out of bounds at %: " + where,
       {pc});
}

void require_aligned(const Thread& t, const void* address, const char* what, const void* pc) {
  if (reinterpret_cast<uintptr_t>(address) % kChunk == 0) return;
  const std::string where =
      in_shared(address) ? "offset " + std::to_string(offset_of(address)) + " of shared memory"
                         : hex(address);
  fail(thread_name(t) + ": misaligned " + what + " at %: " + where + " is no multiple of 16", {pc});
}

const char* space_of(const void* address) {
  return in_shared(address) ? "shared" : on_stacks(address) ? "local" : "global";
}

void require_space(const Thread& t, const void* address, const char* space, const char* what,
                   const void* pc) {
  if (std::strcmp(space_of(address), space) == 0) return;
  fail(thread_name(t) + ": " + what + " at % is in " + space_of(address) + " memory, must be in " +
           space,
       {pc});
}

void land(const Thread& t, const AsyncCopy& copy) {
  touch_shared(t, offset_of(copy.s_to), kChunk, Kind::copy_landed, copy.pc);
  std::memset(copy.s_to, 0, kChunk);
  std::memcpy(copy.s_to, copy.g_from, static_cast<size_t>(copy.bytes));
}

}  // namespace

void touch(const void* address, size_t bytes, bool write, const void* pc) {
  const Thread* t = current;
  if (t == nullptr || on_stacks(address)) return;
  if (!in_shared(address)) return touch_global(*t, address, bytes, write, pc);
  touch_shared(*t, offset_of(address), bytes, write ? Kind::write : Kind::read, pc);
}

void allow(const void* data, size_t bytes) {
  const unsigned char* begin = static_cast<const unsigned char*>(data);
  allowed.push_back({begin, begin + bytes});
}

void allow(const TensorRef& t) {
  static constexpr int64_t kBytes[] = {4, 2, 2, 1, 4, 8, 8};  // in the order of DType
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.size[i] - 1) * t.stride[i];
  if (last >= 0) allow(t.data, static_cast<size_t>((last + 1) * kBytes[static_cast<int>(t.dtype)]));
}

Memory::~Memory() {
  allowed.clear();
}

void begin_block(size_t dynamic_bytes, const void* argument_data, size_t argument_bytes) {
  const unsigned char* begin = static_cast<const unsigned char*>(argument_data);
  arguments = {begin, begin + argument_bytes};
  ++block_number;
  order_block();
  for (unsigned i = 0; i < block.threads; ++i) known[i][i] += known[i][i] == 0;
  arrays[0] = {nullptr, 0, dynamic_bytes};
  array_count = 1;
  arena_used = dynamic_bytes;
  std::memset(arena, kPoison, dynamic_bytes);
}

void order_block() {
  ++barrier_number;
}

void order_lanes(unsigned warp, unsigned mask) {
  // Only the clocks of the warp itself: between warps the barrier of the block orders, which needs
  // none. What will order single threads of different warps must join all of them.
  const unsigned first = warp * kLanes;
  uint32_t joined[kLanes] = {};
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const uint32_t* own = known[first + static_cast<unsigned>(__builtin_ctz(rest))] + first;
    for (unsigned u = 0; u < kLanes; ++u) joined[u] = std::max(joined[u], own[u]);
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned t = first + static_cast<unsigned>(__builtin_ctz(rest));
    std::memcpy(known[t] + first, joined, sizeof joined);
    ++known[t][t];
  }
}

void* static_shared(const void* tag, size_t bytes) {
  for (size_t i = 1; i < array_count; ++i) {
    if (arrays[i].tag == tag) return arena + arrays[i].begin;
  }
  const size_t begin = (arena_used + kRedZone + kChunk - 1) / kChunk * kChunk;
  if (array_count == kMaxArrays || begin + bytes > kArenaBytes) {
    fail("% asks for more shared arrays than a block can have", {FASTGPT_PC});
  }
  arrays[array_count++] = {tag, begin, begin + bytes};
  arena_used = begin + bytes;
  size_t total = 0;
  for (size_t i = 0; i < array_count; ++i) total += arrays[i].end - arrays[i].begin;
  if (total > kMaxSharedBytes || total - arrays[0].end > 48 * 1024) {
    fail("% asks for an array beyond 48 KiB of static or 227 KiB of all shared memory",
         {FASTGPT_PC});
  }
  const size_t dynamic = arrays[0].end - arrays[0].begin;
  if (dynamic > 0 && total - dynamic > cuda::kStaticSharedBytes) {
    fail("% asks for more than 1 KiB of static shared memory beside dynamic", {FASTGPT_PC});
  }
  std::memset(arena + begin, kPoison, bytes);
  return arena + begin;
}

unsigned char* dynamic_shared() {
  return arena;
}

void require_shared(const Thread& t, const void* s_address, const char* what, const void* pc) {
  require_space(t, s_address, "shared", what, pc);
}

void require_global(const void* g_address) {
  require_space(*current, g_address, "global", "a store or load of global memory", FASTGPT_PC);
}

void read_row(const Thread& t, const void* s_row, const void* pc) {
  require_aligned(t, s_row, "ldmatrix", pc);
  require_space(t, s_row, "shared", "a row of ldmatrix", pc);
  touch_shared(t, offset_of(s_row), kChunk, Kind::read_by_warp, pc);
}

void begin_reading(const Thread& t, const void* s_chunk, const void* pc) {
  require_space(t, s_chunk, "shared", "a matrix of a product", pc);
  const size_t offset = offset_of(s_chunk);
  touch_shared(t, offset, kChunk, Kind::read_by_warp, pc);
  Chunk& chunk = chunk_at(offset);
  for (const Access& store : chunk.stores) {
    const std::vector<Fence>& fences = block.thread[store.thread].fences;
    const bool fenced = store.fences < fences.size();
    if (fenced) {
      const Fence& fence = fences[store.fences];  // the first since
      Access access = store;
      access.clock = fence.clock;
      if (fence.barrier < barrier_number || is_ordered(access, t, true)) continue;
    }
    fail(thread_name(t) + " multiplies " + bytes_at(kChunk, offset) + " at %, thread " +
             std::to_string(store.thread) + " wrote there at %, and has " +
             (fenced ? "called fence_shared() only after the barrier between the two"
                     : "not called fence_shared() since"),
         {pc, store.pc});
  }
  ++chunk.products;
  chunk.product_pc = pc;
}

void end_reading(const Thread& t, const void* s_chunk, const void* pc) {
  touch_shared(t, offset_of(s_chunk), kChunk, Kind::read_by_warp, pc);
  --chunk_at(offset_of(s_chunk)).products;
}

void fence_shared() {
  Thread& t = *current;
  t.fences.push_back({barrier_number, known[t.id][t.id]});
}

void copy_async(void* s_to, const void* g_from, int bytes) {
  Thread& t = *current;
  const void* pc = FASTGPT_PC;
  require_aligned(t, s_to, "destination of a copy", pc);
  require_aligned(t, g_from, "source of a copy", pc);
  if (bytes < 0 || bytes > static_cast<int>(kChunk)) {
    fail(thread_name(t) + " copies " + std::to_string(bytes) + " bytes of a chunk at %", {pc});
  }
  require_space(t, s_to, "shared", "the destination of a copy", pc);
  if (bytes > 0) require_space(t, g_from, "global", "the source of a copy", pc);
  if (bytes > 0) touch_global(t, g_from, static_cast<size_t>(bytes), false, pc);
  touch_shared(t, offset_of(s_to), kChunk, Kind::copy_issued, pc);
  std::memset(s_to, kPoison, kChunk);
  t.copies.push_back({static_cast<unsigned char*>(s_to), static_cast<const unsigned char*>(g_from),
                      bytes, t.group, pc});
}

void commit_copies() {
  ++current->group;
}

void wait_copies(int groups) {
  Thread& t = *current;
  const auto arrives = [&](const AsyncCopy& copy) {
    return copy.group + static_cast<unsigned>(groups) < t.group;
  };
  for (const AsyncCopy& copy : t.copies) {
    if (arrives(copy)) land(t, copy);
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), arrives), t.copies.end());
}

void check_no_copies(const Thread& t) {
  if (t.copies.empty()) return;
  fail(thread_name(t) + " returns with " + std::to_string(t.copies.size()) +
           " copies in flight, the first of %",
       {t.copies.front().pc});
}

}  // namespace fastgpt::emulator

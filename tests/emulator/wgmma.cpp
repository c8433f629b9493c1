// Products of a warpgroup (csrc/cuda/wgmma.cuh has their layouts), each warp its own 16 rows. From
// its issue to the wait for its group a product reads shared memory and owns its accumulators,
// which hold NaN; it is computed at that wait, from what shared memory holds then.
#include <algorithm>
#include <cstring>
#include <deque>

#include "tests/emulator/block.h"
#include "tests/emulator/floats.h"

namespace fastgpt::emulator {
namespace {

constexpr int kRows = 16, kDepth = 16, kMostColumns = 128;  // of a warp's part of a product
constexpr int kRowBytes = 128, kChunkBytes = 16, kPanelColumns = 64, kPanelAlignment = 1024;
constexpr unsigned kWarpsTogether = 4;
constexpr uint32_t kPoison = 0xffffffffu;  // NaN

struct Operand {
  float* d;
  const uint32_t* a;  // null: in shared memory
  SharedMatrix s_a, s_b;
  int n;
  bool transposed;  // b: its rows are columns of the product
  bool add;
};

struct Accumulators {
  float* d[kLanes];
  int n;
  int pending;
  float value[kRows][kMostColumns];
};

struct Product {
  size_t accumulators;
  uint32_t a[kLanes][4];
  Operand operand;  // of lane 0
  bool bf16;
  unsigned group;
  const void* pc;
};

// Products are the same in all warps of a warpgroup.
struct Issue {
  const void* pc;
  const void *s_a, *s_b;
};

struct Warp {
  bool begun;
  unsigned group;  // the number that the next commit gives
  unsigned issued;
  std::deque<Product> products;
  std::vector<Accumulators> accumulators;
};

Warp warps[kMaxThreads / kLanes];
std::vector<Issue> issues[kMaxThreads / kLanes / kWarpsTogether];  // of each warpgroup

// Where row `row` and chunk `chunk` (of 8) of a panel lie: the hardware's permutation of addresses.
const unsigned char* swizzled(const void* s_panel, int row, int chunk) {
  const uintptr_t at =
      reinterpret_cast<uintptr_t>(s_panel) + static_cast<uintptr_t>(row) * kRowBytes;
  return reinterpret_cast<const unsigned char*>(
      at + static_cast<uintptr_t>(chunk * kChunkBytes ^ (at / kRowBytes % 8 * kChunkBytes)));
}

const void* panel_of(const void* s_first) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(s_first) & ~uintptr_t{127});
}

// Both chunks of a row of an operand whose rows are what is summed over.
void row_chunks(const SharedMatrix& m, int row, const unsigned char* (&s_chunks)[2]) {
  const int first =
      static_cast<int>(reinterpret_cast<uintptr_t>(m.s_first) % kRowBytes) / kChunkBytes;
  for (int i = 0; i < 2; ++i) s_chunks[i] = swizzled(panel_of(m.s_first), row, first + i);
}

// Chunk `chunk` of row `row` of a second operand that is not transposed.
const unsigned char* column_chunk(const SharedMatrix& m, int row, int chunk) {
  const int per_row = kRowBytes / kChunkBytes;
  const unsigned char* s_panel =
      static_cast<const unsigned char*>(m.s_first) + chunk / per_row * m.panel_bytes;
  return swizzled(s_panel, row, chunk % per_row);
}

// visit(chunk) of all that the warp's part of the product reads.
template <typename Visit>
void visit_chunks(const Operand& o, unsigned warp, const Visit& visit) {
  const unsigned char* s_chunks[2];
  if (o.a == nullptr) {
    const int first_row = static_cast<int>(warp % kWarpsTogether) * kRows;
    for (int row = first_row; row < first_row + kRows; ++row) {
      row_chunks(o.s_a, row, s_chunks);
      for (const unsigned char* s_chunk : s_chunks) visit(s_chunk);
    }
  }
  if (o.transposed) {
    for (int row = 0; row < o.n; ++row) {
      row_chunks(o.s_b, row, s_chunks);
      for (const unsigned char* s_chunk : s_chunks) visit(s_chunk);
    }
    return;
  }
  for (int row = 0; row < kDepth; ++row) {
    for (int chunk = 0; chunk < o.n / 8; ++chunk) visit(column_chunk(o.s_b, row, chunk));
  }
}

template <bool kBf16>
void floats_of(const unsigned char* s_chunk, float* to, int stride) {
  uint16_t bits[8];
  std::memcpy(bits, s_chunk, sizeof bits);
  for (int i = 0; i < 8; ++i) to[i * stride] = float_of<kBf16>(bits[i]);
}

template <bool kBf16>
void multiply(const Product& p, unsigned warp, Accumulators& to) {
  typedef float Quarter __attribute__((vector_size(16)));
  static float a[kRows][kDepth];
  alignas(16) static float b[kDepth][kMostColumns];
  const Operand& o = p.operand;
  const unsigned char* s_chunks[2];
  if (o.a == nullptr) {
    for (int row = 0; row < kRows; ++row) {
      row_chunks(o.s_a, static_cast<int>(warp % kWarpsTogether) * kRows + row, s_chunks);
      for (int i = 0; i < 2; ++i) floats_of<kBf16>(s_chunks[i], a[row] + 8 * i, 1);
    }
  } else {
    for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
      for (int i = 0; i < 4; ++i) {
        for (int e = 0; e < 2; ++e) {
          a[lane / 4 + i % 2 * 8][lane % 4 * 2 + e + i / 2 * 8] =
              float_of<kBf16>(p.a[lane][i] >> 16 * e);
        }
      }
    }
  }
  if (o.transposed) {
    for (int column = 0; column < o.n; ++column) {
      row_chunks(o.s_b, column, s_chunks);
      for (int i = 0; i < 2; ++i) floats_of<kBf16>(s_chunks[i], b[8 * i] + column, kMostColumns);
    }
  } else {
    for (int k = 0; k < kDepth; ++k) {
      for (int chunk = 0; chunk < o.n / 8; ++chunk) {
        floats_of<kBf16>(column_chunk(o.s_b, k, chunk), b[k] + 8 * chunk, 1);
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < o.n; column += 4) {
      Quarter sum = {}, factor;
      for (int k = 0; k < kDepth; ++k) {
        std::memcpy(&factor, b[k] + column, sizeof factor);
        sum += a[row][k] * factor;
      }
      for (int i = 0; i < 4; ++i) {
        float& d = to.value[row][column + i];
        d = o.add ? d + sum[i] : sum[i];
      }
    }
  }
}

// visit(accumulator of a lane, its value in the matrix)
template <typename Visit>
void visit_accumulators(Accumulators& acc, const Visit& visit) {
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int i = 0; i < acc.n / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      visit(static_cast<unsigned>(lane), acc.d[lane][i], acc.value[row][column]);
    }
  }
}

void require_untouched(Accumulators& acc, const Product& last, unsigned warp) {
  visit_accumulators(acc, [&](unsigned lane, float& d, float&) {
    uint32_t bits;
    std::memcpy(&bits, &d, sizeof bits);
    if (bits == kPoison) return;
    const Thread& t = block.thread[warp * kLanes + lane];
    fail(thread_name(t) +
             " has written an accumulator of a product of %, seen at %, before a wait "
             "for it",
         {last.pc, t.pc});
  });
}

const Product& last_of(const Warp& w, size_t accumulators) {
  size_t i = w.products.size() - 1;
  while (w.products[i].accumulators != accumulators) --i;
  return w.products[i];
}

// The accumulators of the operands, NaN from now on.
size_t take_accumulators(Warp& w, void* const* operands, unsigned warp) {
  const Operand& first = *static_cast<Operand*>(operands[0]);
  const Thread& t = block.thread[warp * kLanes];
  size_t unused = w.accumulators.size();
  for (size_t i = 0; i < w.accumulators.size(); ++i) {
    Accumulators& acc = w.accumulators[i];
    if (acc.pending == 0) {
      unused = i;
      continue;
    }
    if (acc.d[0] + acc.n / 2 <= first.d || first.d + first.n / 2 <= acc.d[0]) continue;
    if (acc.d[0] != first.d || acc.n != first.n) {
      fail(thread_name(t) + " multiplies at % into a part of what a product of % is on its way to",
           {t.pc, last_of(w, i).pc});
    }
    require_untouched(acc, last_of(w, i), warp);
    ++acc.pending;
    return i;
  }
  if (unused == w.accumulators.size()) w.accumulators.emplace_back();
  Accumulators& acc = w.accumulators[unused];
  acc.n = first.n;
  acc.pending = 1;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    acc.d[lane] = static_cast<Operand*>(operands[lane])->d;
  }
  visit_accumulators(acc, [](unsigned, float& d, float& value) {
    value = d;
    std::memcpy(&d, &kPoison, sizeof d);
  });
  return unused;
}

void require_panel(const Thread& t, const void* s_panel, const char* what) {
  require_shared(t, s_panel, "a matrix of a product", t.pc);
  if (reinterpret_cast<uintptr_t>(s_panel) % kPanelAlignment == 0) return;
  fail(thread_name(t) + ": misaligned " + what + " of a product at %: offset " +
           std::to_string(reinterpret_cast<uintptr_t>(s_panel) % kPanelAlignment) +
           " from a multiple of 1024",
       {t.pc});
}

// The first 16 bytes of 32 of a panel's first row.
void require_step(const Thread& t, const SharedMatrix& m) {
  const uintptr_t within = reinterpret_cast<uintptr_t>(m.s_first) % kRowBytes;
  require_panel(t, panel_of(m.s_first), "panel");
  if (within % 32 == 0) return;
  fail(thread_name(t) + ": misaligned columns of a product at %: byte " + std::to_string(within) +
           " of a row",
       {t.pc});
}

void require_together(const Warp& w, void* const* operands, unsigned warp) {
  const Operand& o = *static_cast<Operand*>(operands[0]);
  const Thread& t = block.thread[warp * kLanes];
  if (block.threads % (kWarpsTogether * kLanes) != 0) {
    fail(thread_name(t) + " multiplies at % in a block of " + std::to_string(block.threads) +
             " threads, which are not whole warpgroups",
         {t.pc});
  }
  for (unsigned lane = 1; lane < kLanes; ++lane) {
    const Operand& other = *static_cast<Operand*>(operands[lane]);
    if (other.s_a.s_first == o.s_a.s_first && other.s_b.s_first == o.s_b.s_first &&
        other.s_b.panel_bytes == o.s_b.panel_bytes && other.add == o.add) {
      continue;
    }
    fail("threads " + std::to_string(t.id) + " and " + std::to_string(t.id + lane) +
             " multiply at % by different matrices",
         {t.pc});
  }
  std::vector<Issue>& group = issues[warp / kWarpsTogether];
  const Issue own{t.pc, o.s_a.s_first, o.s_b.s_first};
  if (w.issued == group.size()) group.push_back(own);
  const Issue& first = group[w.issued];
  if (first.pc != own.pc || first.s_a != own.s_a || first.s_b != own.s_b) {
    fail(thread_name(t) +
             " multiplies at %, another warp of its warpgroup at %, or by another "
             "matrix",
         {own.pc, first.pc});
  }
  const unsigned first_warp = warp / kWarpsTogether * kWarpsTogether;
  for (unsigned i = first_warp; i < first_warp + kWarpsTogether; ++i) {
    if (block.thread[i * kLanes].state != Thread::done || warps[i].issued > w.issued) continue;
    fail(thread_name(t) + " multiplies at %, a warp of its warpgroup has returned", {t.pc});
  }
}

template <bool kBf16>
void issue(void* const* operands, unsigned) {
  const unsigned warp = current->warp;
  Warp& w = warps[warp];
  const Operand& o = *static_cast<Operand*>(operands[0]);
  const Thread& t = block.thread[warp * kLanes];
  if (compute_capability() != 90) {
    fail(thread_name(t) + " multiplies at % by wgmma, which compute capability " +
             std::to_string(compute_capability()) + " does not have",
         {t.pc});
  }
  require_together(w, operands, warp);
  ++w.issued;
  if (!w.begun) {
    fail(thread_name(t) + " multiplies at % without wgmma_begin() since its last wait", {t.pc});
  }
  if (o.a == nullptr) require_step(t, o.s_a);
  if (o.transposed) {
    require_step(t, o.s_b);
  } else {
    require_panel(t, o.s_b.s_first, "panel");
    if (o.n > kPanelColumns) {
      require_panel(t, static_cast<const unsigned char*>(o.s_b.s_first) + o.s_b.panel_bytes,
                    "second panel");
    }
  }
  visit_chunks(o, warp, [&](const unsigned char* s_chunk) { begin_reading(t, s_chunk, t.pc); });
  Product p{take_accumulators(w, operands, warp), {}, o, kBf16, w.group, t.pc};
  for (unsigned lane = 0; o.a != nullptr && lane < kLanes; ++lane) {
    std::memcpy(p.a[lane], static_cast<Operand*>(operands[lane])->a, sizeof p.a[lane]);
  }
  w.products.push_back(p);
}

void finish(void* const* operands, unsigned) {
  const unsigned warp = current->warp;
  Warp& w = warps[warp];
  const unsigned groups = static_cast<unsigned>(*static_cast<int*>(operands[0]));
  const Thread& t = block.thread[warp * kLanes];
  w.begun = false;
  while (!w.products.empty() && w.products.front().group + groups < w.group) {
    const Product& p = w.products.front();
    Accumulators& acc = w.accumulators[p.accumulators];
    p.bf16 ? multiply<true>(p, warp, acc) : multiply<false>(p, warp, acc);
    visit_chunks(p.operand, warp,
                 [&](const unsigned char* s_chunk) { end_reading(t, s_chunk, p.pc); });
    if (acc.pending == 1) {
      require_untouched(acc, p, warp);
      visit_accumulators(acc, [](unsigned, float& d, float& value) { d = value; });
    }
    --acc.pending;
    w.products.pop_front();
  }
}

}  // namespace

void wgmma_begin() {
  meet("wgmma_begin", ~0u, {"", 0}, FASTGPT_PC, nullptr,
       [](void* const*, unsigned) { warps[current->warp].begun = true; });
}

void wgmma_commit() {
  meet("wgmma_commit", ~0u, {"", 0}, FASTGPT_PC, nullptr,
       [](void* const*, unsigned) { ++warps[current->warp].group; });
}

void wgmma_wait(int groups) {
  meet("wgmma_wait", ~0u, {"", groups}, FASTGPT_PC, &groups, finish);
}

void wgmma_ss(float* r_d, int n, SharedMatrix a, SharedMatrix b, bool add, bool bf16) {
  Operand own{r_d, nullptr, a, b, n, true, add};
  meet("wgmma", ~0u, {"", n * 2 + bf16}, FASTGPT_PC, &own, bf16 ? issue<true> : issue<false>);
}

void wgmma_rs(float* r_d, int n, const uint32_t* r_a, SharedMatrix b, bool transposed, bool add,
              bool bf16) {
  Operand own{r_d, r_a, {}, b, n, transposed, add};
  meet("wgmma of registers", ~0u, {"", n * 4 + transposed * 2 + bf16}, FASTGPT_PC, &own,
       bf16 ? issue<true> : issue<false>);
}

void begin_products() {
  for (Warp& w : warps) {
    w.begun = false;
    w.group = w.issued = 0;
    w.products.clear();
    w.accumulators.clear();
  }
  for (std::vector<Issue>& group : issues) group.clear();
}

void check_no_products(const Thread& t) {
  const Warp& w = warps[t.warp];
  if (!w.products.empty()) {
    fail(thread_name(t) + " returns with " + std::to_string(w.products.size()) +
             " products under way, the first of %",
         {w.products.front().pc});
  }
  const std::vector<Issue>& group = issues[t.warp / kWarpsTogether];
  if (w.issued == group.size()) return;
  fail(thread_name(t) + " returns, another warp of its warpgroup multiplies at %",
       {group[w.issued].pc});
}

}  // namespace fastgpt::emulator

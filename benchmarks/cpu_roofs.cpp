// fastgpt_cpu_roofs_<level> [threads]: the limits that the CPU kernels can be held against on this
// machine, as one JSON object: on all threads, and (..._1_thread) on one. Every figure is the best
// of several short runs. Each thread works on memory of its own, which it touches first.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "csrc/cpu/attention_head.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/tile_gemm.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int kRuns = 7;
constexpr size_t kMemory = size_t{128} << 20;  // of a tensor, over all threads: more than a cache

// What nobody needs goes here, lest the compiler drop what computes it.
std::atomic<float> sink;

// Independent chains of operations that stay in registers: enough to hide the latency of two units,
// few enough for the 16 or 32 registers of the level.
constexpr int kChains = kLanes == 16 ? 24 : 12;
constexpr int64_t kSteps = 1 << 22;

// step(sum) for every chain, kSteps times.
template <typename Step>
void run_chains(const Step& step) {
  Vec sum[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum[i] = set1(static_cast<float>(i));
  for (int64_t n = 0; n < kSteps; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = step(sum[i]);
  }
  Vec total = zero();
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) total = total + sum[i];
  sink = reduce_add(total);
}

// A kind of work: made on its thread, and called for one run, which returns its flops or bytes.
struct MultiplyAdds {
  MultiplyAdds(int thread, int) : slope(0.5f / static_cast<float>(thread + 1)) {}
  double operator()() const {
    // The product is of the sum: one of constants would leave the loop where there is no FMA.
    const Vec factor = set1(slope), term = set1(1.0f);
    run_chains([&](Vec sum) { return fma(sum, factor, term); });
    return 2.0 * kLanes * kChains * kSteps;
  }
  float slope;
};

struct PairDots {
  PairDots(int thread, int) : value(0x1p-10f / static_cast<float>(thread + 1)) {}
  double operator()() const {
    const Vec factor = set1(value);
    run_chains([&](Vec sum) { return Pairs::mac(factor, factor, sum); });
    return 4.0 * kLanes * kChains * kSteps;
  }
  float value;
};

// scores (keys, queries) = k (keys, d) q (d, queries) of one tile of attention with d = 64.
template <class Op>
struct TileProducts {
  static constexpr int kDepth = 64, kProducts = 4000;

  TileProducts(int, int) : memory(floats() * sizeof(float)) {
    for (int64_t i = 0; i < floats(); ++i) memory.at()[i] = 0x1p-10f;
  }
  static int64_t floats() {
    return kKeyTile * packed_step(kDepth) + kDepth * kQueryTile + kKeyTile * kQueryTile;
  }
  double operator()() const {
    const int64_t k_row = packed_step(kDepth);
    float* k = memory.at();
    float* q = k + kKeyTile * k_row;
    float* scores = q + kDepth * kQueryTile;
    const int depth = Op::kPaired ? kDepth / 2 : kDepth;
    const TileProduct t = {kKeyTile, kQueryTile / kLanes, depth,  k,          k_row,        1,
                           q,        kQueryTile,          scores, kQueryTile, Into::kStore, 1.0f,
                           nullptr};
    for (int i = 0; i < kProducts; ++i) tile_product<Op>(t);
    sink = scores[0];
    return 2.0 * kKeyTile * kQueryTile * kDepth * kProducts;
  }
  Scratch memory;
};

// A thread's part of a tensor of kMemory bytes, in whole pages.
struct Part {
  explicit Part(int threads)
      : bytes(kMemory / threads / 4096 * 4096), floats(bytes / sizeof(float)), memory(bytes) {
    std::memset(memory.at(), 1, bytes);
  }
  size_t bytes;
  size_t floats;
  Scratch memory;
};

struct Reads {
  Reads(int, int threads) : from(threads) {}
  double operator()() const {
    constexpr int kSums = 8;
    Vec sum[kSums];
    for (Vec& s : sum) s = zero();
    const float* p = from.memory.at();
    for (size_t at = 0; at < from.floats; at += kSums * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) sum[i] = sum[i] + load(p + at + i * kLanes);
    }
    Vec total = zero();
    for (const Vec& s : sum) total = total + s;
    sink = reduce_add(total);
    return static_cast<double>(from.bytes);
  }
  Part from;
};

struct Copies {
  Copies(int, int threads) : from(threads), to(threads) {}
  double operator()() const {
    std::memcpy(to.memory.at(), from.memory.at(), from.bytes);
    return 2.0 * static_cast<double>(from.bytes);
  }
  Part from, to;
};

// Stores past the caches, which do not read the line that they write.
struct StreamingCopies : Copies {
  using Copies::Copies;
  double operator()() const {
    const float* p = from.memory.at();
    float* q = to.memory.at();
    for (size_t at = 0; at < from.floats; at += 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) stream(q + at + i * kLanes, load(p + at + i * kLanes));
    }
    stream_fence();
    return 2.0 * static_cast<double>(from.bytes);
  }
};

// Flops or bytes a nanosecond: of all threads, from the first one's start to the last one's end.
template <class Work>
double rate(int threads) {
  using Clock = std::chrono::steady_clock;
  struct Run {
    Clock::time_point begin, end;
    double done;
  };
  std::vector<Run> runs(kRuns * threads);  // (run, thread)
  std::atomic<int> arrived{0};
  const auto measure = [&](int thread) {
    const Work work(thread, threads);
    work();
    for (int run = 0; run < kRuns; ++run) {
      ++arrived;
      while (arrived < (run + 1) * threads) std::this_thread::yield();
      Run& mine = runs[run * threads + thread];
      mine.begin = Clock::now();
      mine.done = work();
      mine.end = Clock::now();
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(measure, thread);
  measure(0);
  for (std::thread& other : others) other.join();

  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const Run* of = &runs[run * threads];
    auto begin = of->begin, end = of->end;
    double done = 0.0;
    for (int thread = 0; thread < threads; ++thread) {
      begin = std::min(begin, of[thread].begin);
      end = std::max(end, of[thread].end);
      done += of[thread].done;
    }
    best = std::max(best, done / std::chrono::duration<double, std::nano>(end - begin).count());
  }
  return best;
}

template <class Work>
void print(const char* name, int threads) {
  std::printf(", \"%s\": %.2f, \"%s_1_thread\": %.2f", name, rate<Work>(threads), name,
              rate<Work>(1));
}

void print_all(int threads) {
  std::printf("{\"threads\": %d", threads);
  print<MultiplyAdds>("fma_gflops", threads);
  print<TileProducts<Floats>>("tile_product_gflops", threads);
  if constexpr (kHasPairs) {
    print<PairDots>("bf16_dot_gflops", threads);
    print<TileProducts<Pairs>>("tile_product_bf16_gflops", threads);
  }
  print<Reads>("read_gb_s", threads);
  print<Copies>("copy_gb_s", threads);
  print<StreamingCopies>("copy_nt_gb_s", threads);
  std::printf("}\n");
}

}  // namespace
}  // namespace FASTGPT_ISA
}  // namespace fastgpt

int main(int argc, char** argv) {
  const int wanted = argc > 1 ? std::atoi(argv[1]) : 0;
  const int here = static_cast<int>(std::thread::hardware_concurrency());
  fastgpt::print_all(wanted > 0 ? wanted : std::max(1, here));
}

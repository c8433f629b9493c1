// The backward of attention over any set of units, a unit being the query heads that share a key
// head of one batch element or document. Two plans with the same tiles, the same products and the
// same order of every sum, hence the same bits; which one runs is free to depend on the machine:
//   whole units   one thread a unit, five products a tile, dq and dk, dv updated together;
//   split tiles   dk, dv by key tile, then dq by query tile, seven products a tile, any number of
//                 threads a unit. Taken when too few units would leave threads idle.
#pragma once

#include "csrc/cpu/attention_pairs.h"
#include "csrc/cpu/parallel.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

struct GradHead {
  Head head;
  Rows dout, out, lo, dq;
  const float* lse;   // (sq)
  const float* dlse;  // (sq) or null
};

// Operands of one tile of queries, in one buffer of query_tile_floats(d).
struct QueryTile {
  int64_t q0;
  int nq;
  int lanes;
  // Floats, or pairs of bf16 where the head uses_pairs: q_t and dout_t along d, the others of rows.
  float* q_t;     // (d, lanes)
  float* dout_t;  // (d, lanes)
  float* q_rows;  // (nq, padded(d))
  float* dout_rows;
  float* lse;    // (lanes) in units of log 2; +inf where the query sees no key
  float* delta;  // (lanes) rowsum(dout * out) - dlse
};

int64_t query_tile_floats(int d);
QueryTile query_tile(const GradHead& g, int64_t q0, float* buffer);
void prepare_query_tile(const GradHead& g, const QueryTile& tile);

int64_t bwd_scratch(int d);

// The probabilities of a tile times the dropout factor, and the gradient of its scores times
// `outer`, both (keys, lanes) in the scratch; k as the last product needs it.
struct TileGradient {
  float* p;
  float* ds;
  FloatRows k;
};
TileGradient score_gradient(const GradHead& g, const QueryTile& tile, KeyRange keys, float outer,
                            float* scratch);

// Keys [begin, end) in whole pairs where the head uses them; accumulators have room for that.
KeyRange tile_keys(const Head& head, KeyRange keys);

// Adds what the tile contributes to dk and dv (nk, padded(d)) from key `keys.begin`, unless they
// are null, and to dq_t (d, lanes), unless it is null.
void backward_tile(const GradHead& g, const QueryTile& tile, KeyRange keys, float* dk, float* dv,
                   float* dq_t, float* scratch);

// Keys of one unit as every product of its tiles reads them, rows packed_step(d) apart.
struct UnitKeys {
  float* k;        // (sk, ...)
  float* v;        // (sk, ...)
  float* k_pairs;  // (sk / 2, ...), only where the head uses_pairs
};

constexpr int64_t kUnitKeyRows = kHasPairs ? 3 : 2;  // rows of UnitKeys a key, at most

// Room for n keys of a unit, a multiple of 2, from `buffer` on.
inline UnitKeys unit_keys(float* buffer, int64_t n, int d) {
  return UnitKeys{buffer, buffer + n * packed_step(d), buffer + 2 * n * packed_step(d)};
}

// Packs keys [begin, end), begin a multiple of kKeyTile; use_packed points a head of the unit
// there.
void pack_unit(const Head& head, KeyRange keys, const UnitKeys& to);
void use_packed(Head& head, const UnitKeys& keys);

void store_dq(const GradHead& g, const QueryTile& tile, const float* dq_t);

// dbias (b|1, h|1, sq|1, sk|1) of a dense problem: every element is one thread's, which walks the
// axes that bias broadcasts over in ascending order.
void bias_gradient(const AttentionBwd& p);

// Whether whole units, handed out in order, would take longer than split tiles: 5 against 7
// products a tile, cost(unit) tiles a unit.
template <typename Problem>
bool prefers_split(const Problem& problem, int threads) {
  const int64_t units = problem.units();
  if (threads == 1 || units >= 8 * int64_t{threads}) return false;
  const Scratch scratch(threads * sizeof(int64_t));
  int64_t* load = scratch.at<int64_t>();
  for (int t = 0; t < threads; ++t) load[t] = 0;
  int64_t total = 0, longest = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    int least = 0;
    for (int t = 1; t < threads; ++t) least = load[t] < load[least] ? t : least;
    load[least] += problem.cost(unit);
    total += problem.cost(unit);
    longest = load[least] > longest ? load[least] : longest;
  }
  return 5 * longest * threads > 7 * total;
}

template <typename Problem>
void backward_whole_units(const Problem& problem, int threads) {
  const int d = problem.d();
  const int64_t row = padded(d);
  const int64_t fixed = query_tile_floats(d) + bwd_scratch(d) + row * kQueryTile;
  const int64_t room = problem.longest_keys() + 1;
  const int64_t each = fixed + room * (2 * row + kUnitKeyRows * packed_step(d));
  const int workers = problem.units() < threads ? static_cast<int>(problem.units()) : threads;
  const WorkerScratch memory(workers, each * sizeof(float));
  parallel_items(problem.units(), workers, [&](int64_t unit, int worker) {
    float* scratch = memory.of(worker);
    float* buffer = scratch + bwd_scratch(d);
    float* dq_t = buffer + query_tile_floats(d);
    float* dk = dq_t + row * kQueryTile;
    const Head first = problem.head(unit, 0).head;
    const int64_t sk = first.sk, even = (sk + 1) & ~int64_t{1};
    float* dv = dk + even * row;
    const UnitKeys packed = unit_keys(dv + even * row, even, d);
    // Keys are packed when the first query sees them and stored when the last one has, so that a
    // band works on what is in the cache.
    int64_t ready = 0, stored = 0;
    const auto prepare_until = [&](int64_t end) {
      end = clamp(ceil_div(end, kKeyTile) * kKeyTile, ready, sk);
      if (end == ready) return;
      const int64_t rows = whole_pairs({ready, end}).end - ready;
      std::memset(dk + ready * row, 0, rows * row * sizeof(float));
      std::memset(dv + ready * row, 0, rows * row * sizeof(float));
      pack_unit(first, {ready, end}, packed);
      ready = end;
    };
    const auto store_until = [&](int64_t end) {
      const int n = static_cast<int>(end - stored);
      narrow_rows(dk + stored * row, row, problem.dk(unit), first.dtype, stored, n, d);
      narrow_rows(dv + stored * row, row, problem.dv(unit), first.dtype, stored, n, d);
      stored = end;
    };
    for (int64_t h = 0; h < problem.group(); ++h) {
      GradHead g = problem.head(unit, h);
      use_packed(g.head, packed);
      for (int64_t q0 = 0; q0 < g.head.sq; q0 += kQueryTile) {
        const QueryTile tile = query_tile(g, q0, buffer);
        prepare_query_tile(g, tile);
        std::memset(dq_t, 0, row * kQueryTile * sizeof(float));
        const KeyRange seen = keys_of_queries(g.head, q0, q0 + tile.nq - 1);
        prepare_until(seen.end);
        const int64_t left_behind = clamp(seen.begin / kKeyTile * kKeyTile, stored, ready);
        if (h == problem.group() - 1) store_until(left_behind);
        for (int64_t block = seen.begin / kKeyTile; block * kKeyTile < seen.end; ++block) {
          const KeyRange seen_here = keys_of_block(g.head, tile.q0, tile.nq, block);
          if (seen_here.begin >= seen_here.end) continue;
          const KeyRange keys = tile_keys(g.head, seen_here);
          backward_tile(g, tile, keys, dk + keys.begin * row, dv + keys.begin * row, dq_t, scratch);
        }
        store_dq(g, tile, dq_t);
      }
    }
    prepare_until(sk);
    store_until(sk);
  });
}

template <typename Problem>
void backward_split_tiles(const Problem& problem, int threads) {
  const int d = problem.d();
  const int64_t row = padded(d), units = problem.units(), group = problem.group();
  const Scratch offsets(2 * (units + 1) * sizeof(int64_t));
  int64_t* query_tiles = offsets.at<int64_t>();  // first tile of a unit, counting every head's
  int64_t* key_tiles = query_tiles + units + 1;
  query_tiles[0] = key_tiles[0] = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const Head head = problem.head(unit, 0).head;
    query_tiles[unit + 1] = query_tiles[unit] + group * ceil_div(head.sq, kQueryTile);
    key_tiles[unit + 1] = key_tiles[unit] + ceil_div(head.sk, kKeyTile);
  }
  const Scratch tiles(query_tiles[units] * query_tile_floats(d) * sizeof(float));
  const int64_t key_floats = kUnitKeyRows * kKeyTile * packed_step(d);
  const Scratch all_keys(key_tiles[units] * key_floats * sizeof(float));
  const auto keys_of_unit = [&](int64_t unit) {
    const int64_t n = (key_tiles[unit + 1] - key_tiles[unit]) * kKeyTile;
    return unit_keys(all_keys.at() + key_tiles[unit] * key_floats, n, d);
  };
  const int64_t each = bwd_scratch(d) + 2 * row * (kQueryTile + kKeyTile);
  const WorkerScratch memory(threads, each * sizeof(float));

  // Query tile `item` of all, and its head.
  const auto with_tile = [&](int64_t item, const auto& body) {
    const int64_t unit = owner_of(query_tiles, units, item);
    const int64_t a_head = (query_tiles[unit + 1] - query_tiles[unit]) / group;
    const int64_t local = item - query_tiles[unit];
    GradHead g = problem.head(unit, local / a_head);
    use_packed(g.head, keys_of_unit(unit));
    body(g, query_tile(g, local % a_head * kQueryTile, tiles.at() + item * query_tile_floats(d)));
  };
  parallel_items(key_tiles[units], threads, [&](int64_t item, int) {
    const int64_t unit = owner_of(key_tiles, units, item);
    const int64_t begin = (item - key_tiles[unit]) * kKeyTile;
    const Head head = problem.head(unit, 0).head;
    pack_unit(head, {begin, clamp(begin + kKeyTile, 0, head.sk)}, keys_of_unit(unit));
  });
  parallel_items(query_tiles[units], threads, [&](int64_t item, int) {
    with_tile(item, [](const GradHead& g, const QueryTile& tile) { prepare_query_tile(g, tile); });
  });
  parallel_items(key_tiles[units], threads, [&](int64_t item, int worker) {
    float* scratch = memory.of(worker);
    float* dk = scratch + bwd_scratch(d);
    float* dv = dk + kKeyTile * row;
    std::memset(dk, 0, 2 * kKeyTile * row * sizeof(float));
    const int64_t unit = owner_of(key_tiles, units, item), block = item - key_tiles[unit];
    const int64_t begin = block * kKeyTile;
    const Head first = problem.head(unit, 0).head;
    const int64_t a_head = ceil_div(first.sq, kQueryTile);
    const int64_t end = clamp(begin + kKeyTile, 0, first.sk);
    const KeyRange queries = queries_of_keys(first, begin, end);
    for (int64_t h = 0; h < group; ++h) {
      for (int64_t t = queries.begin / kQueryTile; t * kQueryTile < queries.end; ++t) {
        with_tile(query_tiles[unit] + h * a_head + t,
                  [&](const GradHead& g, const QueryTile& tile) {
                    const KeyRange keys = keys_of_block(g.head, tile.q0, tile.nq, block);
                    if (keys.begin >= keys.end) return;
                    const int64_t at = (keys.begin - begin) * row;
                    backward_tile(g, tile, keys, dk + at, dv + at, nullptr, scratch);
                  });
      }
    }
    const int n = static_cast<int>(end - begin);
    narrow_rows(dk, row, problem.dk(unit), first.dtype, begin, n, d);
    narrow_rows(dv, row, problem.dv(unit), first.dtype, begin, n, d);
  });
  parallel_items(query_tiles[units], threads, [&](int64_t item, int worker) {
    float* scratch = memory.of(worker);
    float* dq_t = scratch + bwd_scratch(d);
    std::memset(dq_t, 0, row * kQueryTile * sizeof(float));
    with_tile(query_tiles[units] - 1 - item, [&](const GradHead& g, const QueryTile& tile) {
      const KeyRange seen = keys_of_queries(g.head, tile.q0, tile.q0 + tile.nq - 1);
      for (int64_t block = seen.begin / kKeyTile; block * kKeyTile < seen.end; ++block) {
        const KeyRange keys = keys_of_block(g.head, tile.q0, tile.nq, block);
        if (keys.begin >= keys.end) continue;
        backward_tile(g, tile, tile_keys(g.head, keys), nullptr, nullptr, dq_t, scratch);
      }
      store_dq(g, tile, dq_t);
    });
  });
}

template <typename Problem>
void backward(const Problem& problem) {
  const int threads = max_threads();
  prefers_split(problem, threads) ? backward_split_tiles(problem, threads)
                                  : backward_whole_units(problem, threads);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

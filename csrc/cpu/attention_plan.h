// What an attention op keeps, and how a ragged step is cut into work.
//
// A query tile is up to 192 rows: consecutive queries of a sequence by the query heads of a KV
// head.  So many pay for what is done once for all of them: a split's keys and values are packed
// for the products, where a reader packs.  A step's work is every query tile by every KV head.  A
// tile that is too large a share of the step for one thread (a long context in decode) is cut at
// splits: its pieces leave their splits' results in scratch, and after a barrier they are joined in
// the same ascending order as within one thread.
#ifndef PYLLMLITE_CPU_ATTENTION_PLAN_H
#define PYLLMLITE_CPU_ATTENTION_PLAN_H

#include <stdio.h>
#include <stdlib.h>

#include "cpu/attention_tile.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kUnitRows = 192;
// Pieces per thread that are enough for an even load.
constexpr int64_t kPieces = 4;
// Units per thread from which on it pays to make them larger.
constexpr int64_t kUnits = 8;
constexpr size_t kPartialBytes = size_t(16) << 20;  // of a whole Program, over all its threads

constexpr int32_t kNoSink = -2;

// Consecutive queries of one sequence, and the splits of their context to attend to.
struct Work {
  int32_t seq;
  int32_t token;        // first, in the batch
  int32_t count;        // queries
  int32_t position;     // of the first
  int32_t first, last;  // splits [first, last)
  int32_t sink;         // the split that stands for the sinks: the one before the window's; or none
  int64_t partial;      // index of the first partial result; -1: none, the output is written
};

struct AttentionState {
  AttentionSpec spec;
  int32_t group;       // query heads of a KV head
  int32_t padded;      // head_dim in whole vectors
  int32_t unit_rows;   // rows of the largest query tile
  float query_scale;   // the scale, and log2(e) where no soft-cap comes before it
  bool packs;          // large query tiles have their keys and values packed first
  int32_t num_threads;
  int32_t unit_heads;  // KV heads of a unit of this step
  int64_t max_work;
  int64_t partials_per_thread;
  // The step's plan: pieces to run, and tiles whose pieces are joined afterwards.
  Work* work;
  int64_t num_work;
  Work* joins;
  int64_t num_joins;
  char** areas;  // [num_threads] every thread's partial results, published at the start of a run
};

// Whole tiles of 16 queries where there is room for them: they end where tiles of keys do.
int32_t rows_of_a_unit(int32_t group) {
  int32_t queries = group < kUnitRows ? kUnitRows / group : 1;
  if (queries > kTile) queries = queries / kTile * kTile;
  return queries * group;
}

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

// One thread's scratch, cut up.  A chunk is what is computed together: at most
// kChunkRows rows.
struct Scratch {
  float* q;        // [unit_rows, padded], each as the reader packs it
  float* a;        // [unit_rows, padded]
  float* m;        // [unit_rows]
  float* l;        // [unit_rows]; < 0: the row has seen no key yet
  float* scores;   // [kChunkRows, kSplit], of a chunk
  float* split;    // [kChunkRows, padded], a of a chunk's split
  float* split_m;  // [kChunkRows]
  float* split_l;  // [kChunkRows]; < 0: the row sees no key of the split
  float* factors;  // [kChunkRows], see Weights
  float* turned;   // [padded], a query as it meets the sinks
  float* packed_k;  // a split's keys and values, where a reader packs them
  float* packed_v;
  char* partials;
};

// Returns its size; fills `out` if there is one.
size_t cut_scratch(const AttentionState& s, void* base, Scratch* out) {
  size_t used = 0;
  auto take = [&](float* Scratch::*field, int64_t elements) {
    if (out) out->*field = reinterpret_cast<float*>(static_cast<char*>(base) + used);
    used += round_up(sizeof(float) * elements);
  };
  take(&Scratch::q, int64_t(s.unit_rows) * s.padded);
  take(&Scratch::a, int64_t(s.unit_rows) * s.padded);
  take(&Scratch::m, s.unit_rows);
  take(&Scratch::l, s.unit_rows);
  take(&Scratch::scores, kChunkRows * kSplit);
  take(&Scratch::split, int64_t(kChunkRows) * s.padded);
  take(&Scratch::split_m, kChunkRows);
  take(&Scratch::split_l, kChunkRows);
  take(&Scratch::factors, kChunkRows);
  take(&Scratch::turned, s.spec.sinks > 0 ? s.padded : 0);
  const int64_t packed = s.packs ? int64_t(kSplit) * s.padded / 2 : 0;
  take(&Scratch::packed_k, packed);
  take(&Scratch::packed_v, packed);
  if (out) out->partials = static_cast<char*>(base) + used;
  return used;
}

// A partial result: m, l, then a at the next cache line.
size_t partial_bytes(const AttentionState& s) { return 64 + sizeof(float) * s.padded; }

float* partial_at(const AttentionState& s, int64_t index) {
  return reinterpret_cast<float*>(s.areas[index / s.partials_per_thread] +
                                  index % s.partials_per_thread * partial_bytes(s));
}

void free_plan(AttentionState* s) {
  free(s->work);
  free(s->joins);
  free(s->areas);
  s->work = s->joins = nullptr;
  s->areas = nullptr;
}

size_t scratch_of(const AttentionState& s) {
  return cut_scratch(s, nullptr, nullptr) + s.partials_per_thread * partial_bytes(s);
}

size_t attention_scratch(void* state, int32_t max_num_tokens, int32_t num_threads) {
  AttentionState* s = static_cast<AttentionState*>(state);
  free_plan(s);
  s->num_threads = num_threads;
  s->max_work = int64_t(max_num_tokens) + 2 * kPieces * num_threads + 16;
  s->work = static_cast<Work*>(malloc(s->max_work * sizeof(Work)));
  s->joins = static_cast<Work*>(malloc(s->max_work * sizeof(Work)));
  s->areas = static_cast<char**>(calloc(num_threads, sizeof(char*)));
  // No step needs more partial results than the whole cache has splits (nor than the budget).
  const KVLayout& kv = s->spec.kv;
  const int64_t splits = int64_t(kv.num_blocks) * kv.block_size / kSplit + max_num_tokens;
  int64_t partials = num_threads > 1 ? splits * s->spec.num_heads : 0;
  const int64_t budget = static_cast<int64_t>(kPartialBytes / partial_bytes(*s));
  if (partials > budget) partials = budget;
  s->partials_per_thread = (partials + num_threads - 1) / num_threads;
  return scratch_of(*s);
}

int32_t first_key(const AttentionSpec& spec, int32_t position) {
  return spec.window > 0 && position >= spec.window ? position - spec.window + 1 : 0;
}

// Sinks that lie before the window of the query at `position`: keys [0, this).
int32_t sinks_before(const AttentionSpec& spec, int32_t position) {
  const int32_t low = first_key(spec, position);
  return low < spec.sinks ? low : spec.sinks;
}

// Tokens between the sinks and that window, which are left out of its positions.
int32_t left_out(const AttentionSpec& spec, int32_t position) {
  return first_key(spec, position) - sinks_before(spec, position);
}

int32_t first_of_split(const Work& w, int32_t split) { return split == w.sink ? 0 : split * kSplit; }

int64_t cost(const AttentionState& s, const Work& w) {
  return int64_t(w.last - w.first) * w.count * s.group;
}

// KV heads whose few rows are computed together (in decode): they lie side by side in a block.
// Fewer where the step's splits by heads would then not be enough to share out.
int32_t heads_of_a_unit(const AttentionState& s, int64_t num_splits) {
  const int32_t all = s.spec.kv.num_kv_heads;
  int32_t heads = s.group <= kRows ? kChunkRows / s.group : 1;
  if (heads > all) heads = all;
  while (heads > 1 && s.num_threads > 1 &&
         num_splits * ((all + heads - 1) / heads) < kUnits * s.num_threads) {
    --heads;
  }
  return heads;
}

// Queries of a tile: fewer than there is room for where the step would not keep all threads busy.
int32_t queries_of_a_tile(const AttentionState& s, const pll_batch& batch) {
  int32_t tile = s.unit_rows / s.group;
  const int64_t enough = kPieces * s.num_threads;
  while (s.num_threads > 1 && tile * s.group > 2 * kRows && tile > 1 &&
         int64_t(batch.num_tokens) * s.spec.kv.num_kv_heads / tile < enough) {
    tile /= 2;
  }
  return tile;
}

int plan_attention(void* state, const pll_batch* batch, char* error, size_t error_size) {
  AttentionState* s = static_cast<AttentionState*>(state);
  const AttentionSpec& spec = s->spec;
  if (spec.kv_group >= batch->num_kv_groups) {
    snprintf(error, error_size, "attention: KV group %d, but the batch has %d", spec.kv_group,
             batch->num_kv_groups);
    return 1;
  }
  const pll_kv_group& group = batch->kv_groups[spec.kv_group];
  if (group.block_size != spec.kv.block_size) {
    snprintf(error, error_size, "attention: made for blocks of %d tokens, but the group has %d",
             spec.kv.block_size, group.block_size);
    return 1;
  }
  const int32_t tile = queries_of_a_tile(*s, *batch);
  int64_t n = 0, total = 0, splits = 0;
  for (int32_t i = 0; i < batch->num_seqs; ++i) {
    const int32_t begin = batch->query_start_loc[i], end = batch->query_start_loc[i + 1];
    if (batch->seq_lens[i] > int64_t(group.max_blocks) * group.block_size) {
      snprintf(error, error_size, "attention: %d tokens, but the block table holds %lld",
               batch->seq_lens[i], int64_t(group.max_blocks) * group.block_size + 0LL);
      return 1;
    }
    if (spec.sinks > 0 && spec.rotary_dim > 0 && batch->seq_lens[i] > spec.num_positions) {
      snprintf(error, error_size, "attention: position %d, but the tables hold %lld",
               batch->seq_lens[i] - 1, spec.num_positions + 0LL);
      return 1;
    }
    // Cut at multiples of the tile; the longest contexts first: what is taken last should be
    // small.
    for (int32_t stop = end, token; stop > begin; stop = token) {
      const int32_t behind = batch->seq_lens[i] - (end - stop);  // position after the last
      const int32_t count = behind % tile != 0 ? behind % tile : tile;
      token = stop - count > begin ? stop - count : begin;
      const int32_t position = behind - (stop - token);
      const int32_t last = behind - 1;
      if (n >= s->max_work || position < 0) {
        snprintf(error, error_size, "attention: the step does not fit the Program's tokens");
        return 1;
      }
      s->work[n] = Work{i, token, stop - token, position, first_key(spec, position) / kSplit,
                        last / kSplit + 1, kNoSink, -1};
      if (sinks_before(spec, last) > 0) s->work[n].sink = --s->work[n].first;
      splits += s->work[n].last - s->work[n].first;
      total += cost(*s, s->work[n++]);
    }
  }
  s->num_work = n;
  s->num_joins = 0;
  s->unit_heads = heads_of_a_unit(*s, splits);
  if (s->num_threads <= 1) return 0;
  // A thread's fair share is total * num_kv_heads / num_threads; cut what is a good part of it.
  const int64_t share = total * spec.kv.num_kv_heads / (kPieces * s->num_threads) + 1;
  int64_t partial = 0;
  const int64_t capacity = s->partials_per_thread * s->num_threads;
  for (int64_t i = 0, tiles = n; i < tiles; ++i) {
    const Work whole = s->work[i];
    const int64_t rows = int64_t(whole.count) * s->group;
    const int64_t needed = int64_t(whole.last - whole.first) * rows * spec.kv.num_kv_heads;
    int32_t step = static_cast<int32_t>(share / (rows * s->unit_heads));
    if (step < 1) step = 1;
    const int32_t pieces = (whole.last - whole.first + step - 1) / step;
    if (pieces < 2 || partial + needed > capacity || s->num_work + pieces > s->max_work) continue;
    Work* piece = &s->work[i];
    for (int32_t first = whole.first; first < whole.last; first += step) {
      *piece = whole;
      piece->first = first;
      piece->last = first + step < whole.last ? first + step : whole.last;
      piece->partial = partial + (first - whole.first) * rows * spec.kv.num_kv_heads;
      piece = &s->work[s->num_work];
      if (first + step < whole.last) ++s->num_work;
    }
    s->joins[s->num_joins] = whole;
    s->joins[s->num_joins++].partial = partial;
    partial += needed;
  }
  return 0;
}

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif

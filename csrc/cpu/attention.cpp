// Causal attention over the paged cache: how a ragged step is cut into work, and shared out.
// The arithmetic is in attention_tile.h.
//
// A query tile is up to 32 rows: consecutive queries of a sequence by the query heads of a KV
// head.  A step's work is every query tile by every KV head, taken dynamically.  A tile that is
// too large a share of the step for one thread (a long context in decode) is cut at splits: its
// pieces leave their splits' results in scratch, and after a barrier they are joined in the same
// ascending order as within one thread.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/buffers.h"
#include "cpu/attention_tile.h"
#include "cpu/factories.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kUnitRows = 32;
// Pieces per thread that are enough for an even load.
constexpr int64_t kPieces = 4;
// Units per thread from which on it pays to make them larger.
constexpr int64_t kUnits = 8;
constexpr size_t kPartialBytes = size_t(16) << 20;  // of a whole Program, over all its threads

// Consecutive queries of one sequence, and the splits of their context to attend to.
struct Work {
  int32_t seq;
  int32_t token;        // first, in the batch
  int32_t count;        // queries
  int32_t position;     // of the first
  int32_t first, last;  // splits [first, last)
  int64_t partial;      // index of the first partial result; -1: none, the output is written
};

struct AttentionState {
  AttentionSpec spec;
  int32_t group;       // query heads of a KV head
  int32_t padded;      // head_dim in whole vectors
  int32_t unit_rows;   // rows of the largest query tile
  float query_scale;   // the scale, and log2(e) where no soft-cap comes before it
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

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

// One thread's scratch, cut up.  A chunk is what is computed together: at most kRows rows.
struct Scratch {
  float* q;        // [unit_rows, head_dim], chunks as [head_dim][rows]
  float* a;        // [unit_rows, padded]
  float* m;        // [unit_rows]
  float* l;        // [unit_rows]; < 0: the row has seen no key yet
  float* scores;   // [kRows, kSplit], of a chunk
  float* split;    // [kRows, padded], a of a chunk's split
  float* split_m;  // [kRows]
  float* split_l;  // [kRows]; < 0: the row sees no key of the split
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
  take(&Scratch::scores, kRows * kSplit);
  take(&Scratch::split, int64_t(kRows) * s.padded);
  take(&Scratch::split_m, kRows);
  take(&Scratch::split_l, kRows);
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

int64_t cost(const AttentionState& s, const Work& w) {
  return int64_t(w.last - w.first) * w.count * s.group;
}

// KV heads whose few rows are computed together (in decode), as long as there is enough to share
// out.
int32_t heads_of_a_unit(const AttentionState& s) {
  const int32_t all = s.spec.kv.num_kv_heads;
  int32_t heads = s.group < kRows ? kRows / s.group : 1;
  if (heads > all) heads = all;
  while (heads > 1 && s.num_threads > 1 &&
         s.num_work * ((all + heads - 1) / heads) < kUnits * s.num_threads) {
    --heads;
  }
  return heads;
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
  const int32_t tile = s->unit_rows / s->group;
  int64_t n = 0, total = 0;
  for (int32_t i = 0; i < batch->num_seqs; ++i) {
    const int32_t begin = batch->query_start_loc[i], end = batch->query_start_loc[i + 1];
    if (batch->seq_lens[i] > int64_t(group.max_blocks) * group.block_size) {
      snprintf(error, error_size, "attention: %d tokens, but the block table holds %lld",
               batch->seq_lens[i], int64_t(group.max_blocks) * group.block_size + 0LL);
      return 1;
    }
    // The longest contexts first: what is taken last should be small.
    for (int32_t stop = end; stop > begin; stop -= tile) {
      const int32_t token = stop - tile > begin ? stop - tile : begin;
      const int32_t position = batch->seq_lens[i] - (end - token);
      const int32_t last = position + (stop - token) - 1;
      if (n >= s->max_work || position < 0) {
        snprintf(error, error_size, "attention: the step does not fit the Program's tokens");
        return 1;
      }
      s->work[n] = Work{i, token, stop - token, position, first_key(spec, position) / kSplit,
                        last / kSplit + 1, -1};
      total += cost(*s, s->work[n++]);
    }
  }
  s->num_work = n;
  s->num_joins = 0;
  s->unit_heads = heads_of_a_unit(*s);
  if (s->num_threads <= 1) return 0;
  // A thread's fair share is total * num_kv_heads / num_threads; cut what is a good part of it.
  const int64_t share = total * spec.kv.num_kv_heads / (kPieces * s->num_threads) + 1;
  int64_t partial = 0;
  const int64_t capacity = s->partials_per_thread * s->num_threads;
  for (int64_t i = 0, tiles = n; i < tiles; ++i) {
    const Work whole = s->work[i];
    const int64_t rows = int64_t(whole.count) * s->group;
    const int64_t needed = int64_t(whole.last - whole.first) * rows * spec.kv.num_kv_heads;
    int32_t step = static_cast<int32_t>(share / rows);
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

// The step's buffers, typed.
template <typename T>
struct Tensors {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  const T* k;
  const T* v;
};

// Addresses of KV head 0's tiles that keys [low, high) of a split touch; false if a block is
// missing.
template <typename T>
bool find_tiles(const AttentionSpec& spec, const int32_t* table, int32_t split, Range range,
                const Tensors<T>& tensors, SplitView<T>* view) {
  const KVLayout& kv = spec.kv;
  const int64_t block_elements = int64_t(kv.num_kv_heads) * kv.head_dim * kv.block_size;
  view->k_stride = kv.block_size;
  view->head_dim = kv.head_dim;
  int32_t t = range.low / kTile;
  const int32_t first = split * kSplit + t * kTile;
  int32_t column = first / kv.block_size, offset = first % kv.block_size;
  for (; t * kTile < range.high; ++t) {
    const int32_t block = table[column];
    if (block < 0 || block >= kv.num_blocks) return false;
    view->k[t] = tensors.k + block * block_elements + offset;
    view->v[t] = tensors.v + block * block_elements + int64_t(offset) * kv.head_dim;
    offset += kTile;
    if (offset == kv.block_size) {
      offset = 0;
      ++column;
    }
  }
  return true;
}

template <typename T>
struct Kernels {
  void (*score)(const SplitView<T>&, const float*, Range, float*);
  void (*weigh)(const SplitView<T>&, const Weights&, float*, int64_t);
};

template <typename T>
Kernels<T> kernels_for(int32_t rows) {
#define PLL_KERNELS(R) \
  case R:              \
    return {score_split<T, R>, weigh_values<T, R>};
  switch (rows) {
    PLL_KERNELS(1)
    PLL_KERNELS(2)
#if PLL_ISA >= PLL_ISA_AVX2
    PLL_KERNELS(3)
    PLL_KERNELS(4)
#endif
#if PLL_ISA >= PLL_ISA_AVX512
    PLL_KERNELS(5)
    PLL_KERNELS(6)
    PLL_KERNELS(7)
    PLL_KERNELS(8)
#endif
    default:
      return {nullptr, nullptr};
  }
#undef PLL_KERNELS
}

// Rows [first, first + n) of a piece as [head_dim][n], scaled.  Row r: query r / group, head
// kv_head * group + r % group.
template <typename T>
void pack_queries(const AttentionState& s, const Work& w, int32_t kv_head, int32_t first,
                  int32_t n, const Tensors<T>& tensors, float* packed) {
  const int32_t head_dim = s.spec.kv.head_dim;
  for (int32_t r = 0; r < n; ++r) {
    const int32_t token = w.token + (first + r) / s.group;
    const int32_t head = kv_head * s.group + (first + r) % s.group;
    const float* q = tensors.q + token * tensors.q_stride + int64_t(head) * head_dim;
    if (n == 1) {
      const vf scale = vset1(s.query_scale);
      for (int32_t d = 0; d < head_dim; d += 16) {
        vstore_n(packed + d, vmul(vload_n(q + d, head_dim - d), scale), head_dim - d);
      }
    } else {
      for (int32_t d = 0; d < head_dim; ++d) packed[d * n + r] = q[d] * s.query_scale;
    }
  }
}

void write_row(const AttentionState& s, const float* a, float l, float* out) {
  const vf inverse = vset1(1.0f / l);
  const int32_t head_dim = s.spec.kv.head_dim;
  for (int32_t d = 0; d < head_dim; d += 16) {
    const vf y = vmul(vload(a + d), inverse);
    if (d + 16 <= head_dim) {
      vstore(out + d, y);
    } else {
      vstore_n(out + d, y, head_dim - d);
    }
  }
}

template <typename T>
float* output_row(const AttentionState& s, const Work& w, int32_t kv_head, int32_t r,
                  const Tensors<T>& tensors) {
  const int32_t head = kv_head * s.group + r % s.group;
  return tensors.out + (w.token + r / s.group) * tensors.out_stride +
         int64_t(head) * s.spec.kv.head_dim;
}

// Rows of a unit that are computed together: rows [first, first + rows) of KV heads
// [kv_head, kv_head + heads).  Row r of head h stands at h * rows + r of the scratch.
struct Chunk {
  int32_t kv_head, heads;
  int32_t first, rows;
};

// One split of one chunk: scores, weights and value sums, head after head so that none waits
// for another's last step.
template <typename T>
void attend_chunk(const AttentionState& s, const Work& w, int32_t split, const Chunk& c,
                  const SplitView<T>& base, const float* q, const Scratch& scratch) {
  const AttentionSpec& spec = s.spec;
  const int32_t start = split * kSplit;
  Range ranges[kRows];
  Range touched{kSplit, 0}, shared{0, kSplit};
  for (int32_t r = 0; r < c.rows; ++r) {
    const int32_t position = w.position + (c.first + r) / s.group;
    const int32_t from = first_key(spec, position) - start, to = position + 1 - start;
    ranges[r] = Range{from > 0 ? from : 0, to < kSplit ? to : kSplit};
    if (ranges[r].low < ranges[r].high) {
      touched.low = ranges[r].low < touched.low ? ranges[r].low : touched.low;
      touched.high = ranges[r].high > touched.high ? ranges[r].high : touched.high;
    }
    shared.low = ranges[r].low > shared.low ? ranges[r].low : shared.low;
    shared.high = ranges[r].high < shared.high ? ranges[r].high : shared.high;
  }
  for (int32_t i = 0; i < c.heads * c.rows; ++i) scratch.split_l[i] = -1;
  if (touched.low >= touched.high) return;
  const Kernels<T> kernels = kernels_for<T>(c.rows);
  SplitView<T> views[kRows];
  for (int32_t h = 0; h < c.heads; ++h) {
    const int64_t offset = int64_t(c.kv_head + h) * spec.kv.head_dim * spec.kv.block_size;
    views[h].k_stride = base.k_stride;
    views[h].head_dim = base.head_dim;
    for (int32_t t = touched.low / kTile; t * kTile < touched.high; ++t) {
      views[h].k[t] = base.k[t] + offset;
      views[h].v[t] = base.v[t] + offset;
    }
    kernels.score(views[h], q + int64_t(h) * c.rows * base.head_dim, touched,
                  scratch.scores + h * c.rows * kSplit);
  }
  for (int32_t i = 0; i < c.heads * c.rows; ++i) {
    const int32_t r = i % c.rows;
    if (ranges[r].low >= ranges[r].high) continue;
    const int32_t head = (c.kv_head + i / c.rows) * s.group + (c.first + r) % s.group;
    const int32_t position = w.position + (c.first + r) / s.group;
    const ScoreMap map{spec.softcap, spec.alibi_slopes ? spec.alibi_slopes[head] * kLog2E : 0,
                       static_cast<float>(start - position)};
    soften(scratch.scores + i * kSplit, ranges[r], map, scratch.split_m + i,
           scratch.split_l + i);
  }
  for (int32_t h = 0; h < c.heads; ++h) {
    const Weights weights{scratch.scores + h * c.rows * kSplit, ranges, touched, shared};
    kernels.weigh(views[h], weights, scratch.split + int64_t(h) * c.rows * s.padded, s.padded);
  }
}

template <typename T>
void run_piece(const AttentionState& s, const Work& w, int32_t kv_head, int32_t heads,
               const int32_t* table, const Tensors<T>& tensors, const Scratch& scratch,
               const pll_context* ctx) {
  const AttentionSpec& spec = s.spec;
  const int32_t rows = w.count * s.group;
  // Few rows of several heads together, else many rows of one.
  if (heads > 1 && rows * heads > kRows) {
    for (int32_t h = 0; h < heads; ++h) {
      run_piece(s, w, kv_head + h, 1, table, tensors, scratch, ctx);
    }
    return;
  }
  const int32_t chunk_rows = rows < kRows ? rows : kRows;
  for (int32_t h = 0; h < heads; ++h) {
    for (int32_t first = 0; first < rows; first += chunk_rows) {
      const int32_t n = rows - first < chunk_rows ? rows - first : chunk_rows;
      pack_queries(s, w, kv_head + h, first, n, tensors,
                   scratch.q + int64_t(h * rows + first) * spec.kv.head_dim);
    }
  }
  const bool whole = w.last - w.first == 1 && w.partial < 0;
  for (int32_t i = 0; i < heads * rows; ++i) scratch.l[i] = -1;
  SplitView<T> view;
  for (int32_t split = w.first; split < w.last; ++split) {
    const int32_t start = split * kSplit;
    // Keys that any of the queries sees: from the first one's window to the last one.
    const int32_t low = first_key(spec, w.position) - start;
    const int32_t high = w.position + w.count - start;
    const Range all{low > 0 ? low : 0, high < kSplit ? high : kSplit};
    if (!find_tiles(spec, table, split, all, tensors, &view)) {
      ctx->fail(ctx, "attention: a block that a query sees is not in the block table");
      return;
    }
    for (int32_t first = 0; first < rows; first += chunk_rows) {
      const int32_t n = rows - first < chunk_rows ? rows - first : chunk_rows;
      const Chunk chunk{kv_head, heads, first, n};
      attend_chunk(s, w, split, chunk, view, scratch.q + int64_t(first) * spec.kv.head_dim,
                   scratch);
      for (int32_t i = 0; i < heads * n; ++i) {
        const int32_t h = i / n, r = first + i % n;
        // Not "l >= 0": a NaN must come through.
        const bool seen = !(scratch.split_l[i] < 0);
        const float* a = scratch.split + int64_t(i) * s.padded;
        if (w.partial >= 0) {
          float* partial = partial_at(
              s, w.partial +
                     (int64_t(split - w.first) * spec.kv.num_kv_heads + kv_head + h) * rows + r);
          partial[0] = scratch.split_m[i];
          partial[1] = scratch.split_l[i];
          if (seen) memcpy(partial + 16, a, s.padded * sizeof(float));
        } else if (whole) {
          write_row(s, a, scratch.split_l[i], output_row(s, w, kv_head + h, r, tensors));
        } else if (seen) {
          const int64_t at = h * rows + r;
          join({scratch.m + at, scratch.l + at, scratch.a + at * s.padded}, scratch.split_m[i],
               scratch.split_l[i], a, s.padded);
        }
      }
    }
  }
  if (whole || w.partial >= 0) return;
  for (int32_t i = 0; i < heads * rows; ++i) {
    write_row(s, scratch.a + int64_t(i) * s.padded, scratch.l[i],
              output_row(s, w, kv_head + i / rows, i % rows, tensors));
  }
}

// The partial results of a tile's row, joined in ascending order.
template <typename T>
void join_row(const AttentionState& s, const Work& w, int32_t kv_head, int32_t r,
              const Tensors<T>& tensors, const Scratch& scratch) {
  const int32_t rows = w.count * s.group;
  const RowState row{scratch.m, scratch.l, scratch.a};
  *row.l = -1;
  for (int32_t split = w.first; split < w.last; ++split) {
    const float* partial = partial_at(
        s, w.partial +
               (int64_t(split - w.first) * s.spec.kv.num_kv_heads + kv_head) * rows + r);
    // Not "l >= 0": a NaN must come through.
    if (partial[1] < 0) continue;
    join(row, partial[0], partial[1], partial + 16, s.padded);
  }
  write_row(s, row.a, *row.l, output_row(s, w, kv_head, r, tensors));
}

template <typename T>
void run_typed(const AttentionState& s, const pll_batch* batch, const pll_tensor* buffers,
               const pll_context* ctx) {
  const AttentionSpec& spec = s.spec;
  const pll_kv_group& group = batch->kv_groups[spec.kv_group];
  const Tensors<T> tensors{static_cast<const float*>(buffers[0].data), buffers[0].stride[0],
                           static_cast<float*>(buffers[1].data),       buffers[1].stride[0],
                           static_cast<const T*>(buffers[2].data),
                           static_cast<const T*>(buffers[3].data)};
  Scratch scratch;
  cut_scratch(s, ctx->scratch, &scratch);
  if (s.num_joins > 0) {
    s.areas[ctx->thread] = scratch.partials;
    ctx->barrier(ctx);
  }
  const int32_t heads = spec.kv.num_kv_heads;
  const int64_t head_groups = (heads + s.unit_heads - 1) / s.unit_heads;
  const int64_t units = s.num_work * head_groups;
  // Several small units at a time, since the counter is shared.
  int64_t grab = units / (int64_t(ctx->num_threads) * 16);
  if (grab < 1) grab = 1;
  for (int64_t u; (u = ctx->fetch_add(ctx, 0, grab)) < units;) {
    for (int64_t end = u + grab < units ? u + grab : units; u < end; ++u) {
      const Work& w = s.work[u / head_groups];
      const int32_t* table = group.block_table + int64_t(batch->rows[w.seq]) * group.max_blocks;
      const int32_t head = static_cast<int32_t>(u % head_groups) * s.unit_heads;
      const int32_t left = heads - head;
      run_piece(s, w, head, left < s.unit_heads ? left : s.unit_heads, table, tensors, scratch,
                ctx);
    }
  }
  if (s.num_joins == 0) return;
  ctx->barrier(ctx);
  const int64_t joins = s.num_joins * heads;
  for (int64_t u; (u = ctx->fetch_add(ctx, 1, 1)) < joins;) {
    const Work& w = s.joins[u / heads];
    for (int32_t r = 0; r < w.count * s.group; ++r) {
      join_row(s, w, static_cast<int32_t>(u % heads), r, tensors, scratch);
    }
  }
}

int check_attention(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t max_num_tokens,
                    int32_t, char* error, size_t error_size) {
  const AttentionSpec& spec = static_cast<AttentionState*>(state)->spec;
  const KVLayout& kv = spec.kv;
  const int64_t cache = saturating_product(saturating_product(kv.num_blocks, kv.num_kv_heads),
                                           int64_t(kv.head_dim) * kv.block_size);
  const int64_t width = int64_t(spec.num_heads) * kv.head_dim;
  const BufferNeed needs[] = {
      {"qkv", PLL_F32, max_num_tokens, width},
      {"out", PLL_F32, max_num_tokens, width},
      {"k_cache", kv.dtype, 0, cache},
      {"v_cache", kv.dtype, 0, cache},
  };
  return check_buffers(needs, 4, buffers, num_buffers, error, error_size);
}

void run_attention(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
                   const pll_context* ctx) {
  const AttentionState& s = *static_cast<AttentionState*>(state);
  if (ctx->num_threads > s.num_threads || ctx->scratch_bytes < scratch_of(s)) {
    ctx->fail(ctx, "attention: its op was finished in another Program since; make an op for each");
    return;
  }
  if (s.spec.kv.dtype == PLL_BF16) {
    run_typed<uint16_t>(s, batch, buffers, ctx);
  } else {
    run_typed<float>(s, batch, buffers, ctx);
  }
}

void destroy_attention(void* state) {
  AttentionState* s = static_cast<AttentionState*>(state);
  free_plan(s);
  delete s;
}

}  // namespace

pll_op make_attention(const AttentionSpec& spec) {
  AttentionState* s = new AttentionState{};
  s->spec = spec;
  s->group = spec.num_heads / spec.kv.num_kv_heads;
  s->query_scale = spec.softcap > 0 ? spec.scale : spec.scale * kLog2E;
  s->padded = (spec.kv.head_dim + 15) / 16 * 16;
  s->unit_rows = s->group > kUnitRows ? s->group : kUnitRows / s->group * s->group;
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "attention";
  op.state = s;
  op.scratch_bytes = attention_scratch;
  op.plan = plan_attention;
  op.run = run_attention;
  op.check = check_attention;
  op.destroy = destroy_attention;
  return op;
}

}  // namespace pyllmlite::PLL_NS

// Causal attention over the paged cache: how the work of a step is run.  How it is cut is in
// attention_plan.h, the arithmetic in attention_tile.h.

#include <math.h>
#include <string.h>

#include "cpu/attention_bf16.h"
#include "cpu/attention_float.h"
#include "cpu/attention_int8.h"
#include "cpu/attention_plan.h"
#include "cpu/buffers.h"
#include "cpu/factories.h"

namespace pyllmlite::PLL_NS {
namespace {

// A piece of work for some KV heads, and the block table of its sequence.
struct Unit {
  const Work* work;
  const int32_t* table;
  int32_t kv_head, heads;
};

// Rows of a unit that are computed together: rows [first, first + rows) of each of its heads.
// Row r of head h stands at h * rows + r of the scratch.
struct Chunk {
  int32_t first, rows;
};

// What one thread does of a step, with keys and values read by READER.
template <typename READER>
class Runner {
 public:
  using Element = typename READER::Element;

  Runner(const AttentionState& state, const pll_batch* batch, const pll_tensor* buffers,
         const pll_context* context)
      : s(state),
        spec(state.spec),
        batch_(*batch),
        group_(batch->kv_groups[state.spec.kv_group]),
        ctx(context),
        q_(static_cast<const float*>(buffers[0].data)),
        q_stride_(buffers[0].stride[0]),
        out_(static_cast<float*>(buffers[1].data)),
        out_stride_(buffers[1].stride[0]),
        k_(static_cast<const Element*>(buffers[2].data)),
        v_(static_cast<const Element*>(buffers[3].data)),
        scales_(kScaled ? static_cast<const float*>(buffers[4].data) : nullptr) {
    cut_scratch(s, ctx->scratch, &scratch);
    const KVLayout& kv = spec.kv;
    view_.k_stride = READER::key_stride(kv.block_size);
    view_.value_scales = kv.block_size;
    view_.head_dim = kv.head_dim;
    view_.packed_k = view_.packed_v = nullptr;
    view_.finite = false;
    head_keys_ = int64_t(READER::key_dims(kv.head_dim)) * kv.block_size;
    head_values_ = int64_t(kv.head_dim) * kv.block_size;
  }

  void run() {
    if (s.num_joins > 0) {
      s.areas[ctx->thread] = scratch.partials;
      ctx->barrier(ctx);
    }
    const int32_t heads = spec.kv.num_kv_heads;
    head_groups_ = (heads + s.unit_heads - 1) / s.unit_heads;
    num_units_ = s.num_work * head_groups_;
    // Several small units at a time, since the counter is shared.
    grab_ = num_units_ / (int64_t(ctx->num_threads) * 16);
    if (grab_ < 1) grab_ = 1;
    // A unit fetches the first keys of the one that follows, which therefore is taken before it
    // runs; the last ones go to whoever comes first.
    for (int64_t u = take(); u >= 0;) {
      const bool ahead = next_ < end_ || u + grab_ + ctx->num_threads < num_units_;
      int64_t following = ahead ? take() : -1;
      const Unit unit = unit_at(u);
      if (following >= 0) {
        const Unit other = unit_at(following);
        run_heads(unit, &other);
      } else {
        run_heads(unit, nullptr);
        if (!ahead) following = take();
      }
      u = following;
    }
    if (s.num_joins == 0) return;
    ctx->barrier(ctx);
    const int64_t joins = s.num_joins * heads;
    for (int64_t u; (u = ctx->fetch_add(ctx, 1, 1)) < joins;) {
      const Work& w = s.joins[u / heads];
      for (int32_t r = 0; r < w.count * s.group; ++r) {
        join_row(w, static_cast<int32_t>(u % heads), r);
      }
    }
  }

 private:
  static constexpr bool kScaled = sizeof(Element) == 1;

  // The next unit that is this thread's, or -1.
  int64_t take() {
    if (next_ == end_) {
      next_ = ctx->fetch_add(ctx, 0, grab_);
      end_ = next_ + grab_ < num_units_ ? next_ + grab_ : num_units_;
      if (next_ >= num_units_) {
        next_ = end_;
        return -1;
      }
    }
    return next_++;
  }

  Unit unit_at(int64_t u) const {
    const Work& w = s.work[u / head_groups_];
    const int32_t head = static_cast<int32_t>(u % head_groups_) * s.unit_heads;
    const int32_t left = spec.kv.num_kv_heads - head;
    return {&w, group_.block_table + int64_t(batch_.rows[w.seq]) * group_.max_blocks, head,
            left < s.unit_heads ? left : s.unit_heads};
  }

  // Few rows of several heads together, else many rows of one after the other.
  void run_heads(const Unit& unit, const Unit* following) {
    const int32_t rows = unit.work->count * s.group;
    if (rows <= kRows && rows * unit.heads <= kChunkRows) return run_unit(unit, following);
    for (int32_t h = 0; h < unit.heads; ++h) {
      const Unit one{unit.work, unit.table, unit.kv_head + h, 1};
      const Unit next{unit.work, unit.table, unit.kv_head + h + 1, 1};
      run_unit(one, h + 1 < unit.heads ? &next : following);
    }
  }

  void run_unit(const Unit& unit, const Unit* following) {
    const Work& w = *unit.work;
    const int32_t rows = w.count * s.group;
    const int32_t chunk_rows = rows < kRows ? rows : kRows;
    const bool packed = s.packs && READER::packs(rows);
    pack_queries(unit, w.first == w.sink);
    for (int32_t i = 0; i < unit.heads * rows; ++i) scratch.l[i] = -1;
    for (int32_t split = w.first; split < w.last; ++split) {
      if (split > w.first && split - 1 == w.sink) pack_queries(unit, false);
      // Keys that any of the queries sees.
      const Range all = seen(w, split);
      if (!find_tiles(unit, split, all)) {
        ctx->fail(ctx, "attention: a block that a query sees is not in the block table");
        return;
      }
      if (packed) {
        uint32_t* keys = reinterpret_cast<uint32_t*>(scratch.packed_k);
        uint32_t* values = reinterpret_cast<uint32_t*>(scratch.packed_v);
        look_at(unit.kv_head);
        view_.finite = READER::pack_split(view_, all, keys, values);
        view_.packed_k = keys;
        view_.packed_v = values;
      } else if (split + 1 < w.last) {
        look_ahead(unit, split + 1);
      } else if (following) {
        look_ahead(*following, following->work->first);
      }
      for (int32_t first = 0; first < rows; first += chunk_rows) {
        const Chunk chunk{first, rows - first < chunk_rows ? rows - first : chunk_rows};
        attend(unit, split, chunk, packed);
        keep(unit, split, chunk);
      }
    }
    if (w.partial >= 0) return;
    for (int32_t i = 0; i < unit.heads * rows; ++i) {
      write_row(scratch.a + int64_t(i) * s.padded, scratch.l[i],
                output_row(w, unit.kv_head + i / rows, i % rows));
    }
  }

  // From the first query's window to the last query.
  Range seen(const Work& w, int32_t split) const {
    if (split == w.sink) return Range{0, sinks_before(spec, w.position + w.count - 1)};
    return in_split(first_key(spec, w.position), w.position + w.count, split * kSplit);
  }

  static Range in_split(int32_t low, int32_t high, int32_t start) {
    return Range{low > start ? low - start : 0, high - start < kSplit ? high - start : kSplit};
  }

  // A query as it meets the sinks: rotated by fewer positions.  (Tables may carry a factor, which
  // row 0 shows.)
  const float* turn_back(const float* q, int32_t positions) {
    if (positions == 0 || spec.rotary_dim == 0) return q;
    float* to = scratch.turned;
    const int32_t half = spec.rotary_dim / 2, dims = spec.kv.head_dim;
    const float* cos = spec.cos + int64_t(positions) * half;
    const float* sin = spec.sin + int64_t(positions) * half;
    memcpy(to, q, sizeof(float) * dims);
    for (int32_t i = 0; i < half; i += 16) {
      const int32_t n = half - i;
      const vf a = vload_n(q + i, n), b = vload_n(q + half + i, n);
      const vf factor = vload_n(spec.cos + i, n);
      const vf c = vdiv(vload_n(cos + i, n), factor), s = vdiv(vload_n(sin + i, n), factor);
      vstore_n(to + i, vfma(a, c, vmul(b, s)), n);
      vstore_n(to + half + i, vsub(vmul(b, c), vmul(a, s)), n);
    }
    return to;
  }

  // Row r of a head: query r / group, query head kv_head * group + r % group.  `sink`: to meet
  // the sinks.
  void pack_queries(const Unit& unit, bool sink) {
    const Work& w = *unit.work;
    const int32_t rows = w.count * s.group;
    for (int32_t h = 0; h < unit.heads; ++h) {
      for (int32_t r = 0; r < rows; ++r) {
        const int32_t head = (unit.kv_head + h) * s.group + r % s.group;
        const float* q =
            q_ + (w.token + r / s.group) * q_stride_ + int64_t(head) * spec.kv.head_dim;
        if (sink) q = turn_back(q, left_out(spec, w.position + r / s.group));
        READER::pack_query(q, spec.kv.head_dim, s.query_scale,
                           scratch.q + int64_t(h * rows + r) * s.padded);
      }
    }
  }

  // body(t, block, offset) for the tiles of a split that the range touches; false if a block is
  // missing.
  template <typename BODY>
  bool each_block(const Unit& unit, int32_t split, Range range, BODY body) const {
    const KVLayout& kv = spec.kv;
    int32_t t = range.low / kTile;
    const int32_t first = first_of_split(*unit.work, split) + t * kTile;
    int32_t column = first / kv.block_size, offset = first % kv.block_size;
    for (; t * kTile < range.high; ++t) {
      const int32_t block = unit.table[column];
      if (block < 0 || block >= kv.num_blocks) return false;
      body(t, block, offset);
      offset += kTile;
      if (offset == kv.block_size) {
        offset = 0;
        ++column;
      }
    }
    return true;
  }

  const Element* keys_at(int64_t block, int32_t offset) const {
    return k_ + block * spec.kv.num_kv_heads * head_keys_ + offset * READER::kDims;
  }
  const float* scales_at(int64_t block, int32_t offset) const {
    return scales_ + block * spec.kv.num_kv_heads * 2 * spec.kv.block_size + offset;
  }

  // Fills view_ with KV head 0's tiles that the range touches; false if a block is missing.
  bool find_tiles(const Unit& unit, int32_t split, Range range) {
    const KVLayout& kv = spec.kv;
    next_head_ = unit.kv_head;
    return each_block(unit, split, range, [&](int32_t t, int64_t block, int32_t offset) {
      // What is read now is fetched again unless look_ahead says better.
      view_.k[t] = view_.next_k[t] = keys_at(block, offset);
      view_.v[t] = v_ + block * kv.num_kv_heads * head_values_ + int64_t(offset) * kv.head_dim;
      if (kScaled) view_.scales[t] = view_.next_scales[t] = scales_at(block, offset);
    });
  }

  // What is fetched while view_'s tiles are read.  (A missing block is found when it is read.)
  void look_ahead(const Unit& unit, int32_t split) {
    each_block(unit, split, seen(*unit.work, split),
               [&](int32_t t, int64_t block, int32_t offset) {
                 view_.next_k[t] = keys_at(block, offset);
                 if (kScaled) view_.next_scales[t] = scales_at(block, offset);
               });
    next_head_ = unit.kv_head;
  }

  // Turns view_ to a head.
  void look_at(int32_t kv_head) {
    view_.k_offset = kv_head * head_keys_;
    view_.v_offset = kv_head * head_values_;
    view_.scale_offset = int64_t(kv_head) * 2 * spec.kv.block_size;
  }

  // One split of one chunk, phase by phase, so that no head waits for another's last step:
  // leaves m, l and a in the scratch.
  void attend(const Unit& unit, int32_t split, const Chunk& c, bool packed) {
    const Work& w = *unit.work;
    const int32_t start = first_of_split(w, split), num_rows = unit.heads * c.rows;
    const bool sink = split == w.sink;
    Range ranges[kRows];
    Row rows[kChunkRows] = {};
    Range touched{kSplit, 0}, shared{0, kSplit};
    for (int32_t i = 0; i < num_rows; ++i) {
      const int32_t h = i / c.rows, r = i % c.rows;
      const int32_t position = w.position + (c.first + r) / s.group;
      const Range range = sink ? Range{0, sinks_before(spec, position)}
                               : in_split(first_key(spec, position), position + 1, start);
      const int32_t head = (unit.kv_head + h) * s.group + (c.first + r) % s.group;
      rows[i] = Row{range, spec.alibi_slopes ? spec.alibi_slopes[head] * kLog2E : 0,
                    static_cast<float>(start - position + (sink ? left_out(spec, position) : 0)),
                    int64_t(unit.kv_head + h) * 2 * spec.kv.block_size};
      if (h > 0) continue;
      ranges[r] = range;
      if (range.low < range.high) {
        touched.low = range.low < touched.low ? range.low : touched.low;
        touched.high = range.high > touched.high ? range.high : touched.high;
      }
      shared.low = range.low > shared.low ? range.low : shared.low;
      shared.high = range.high < shared.high ? range.high : shared.high;
    }
    const Kernels<Element> kernels = READER::kernels(c.rows, packed);
    for (int32_t h = 0; h < unit.heads && touched.low < touched.high; ++h) {
      look_at(unit.kv_head + h);
      const float* q = scratch.q + int64_t(h * unit.work->count * s.group + c.first) * s.padded;
      kernels.score(view_, {q, s.padded}, touched, scratch.scores + h * c.rows * kSplit);
    }
    READER::soften(view_, scratch.scores, rows, num_rows, touched, spec.softcap, scratch.split_m,
                   scratch.split_l, scratch.factors);
    for (int32_t h = 0; h < unit.heads && touched.low < touched.high; ++h) {
      look_at(unit.kv_head + h);
      view_.next_k_offset = (next_head_ + h) * head_keys_;
      view_.next_scale_offset = int64_t(next_head_ + h) * 2 * spec.kv.block_size;
      const Weights weights{scratch.scores + h * c.rows * kSplit, scratch.factors + h * c.rows,
                            ranges, touched, shared};
      kernels.weigh(view_, weights, scratch.split + int64_t(h) * c.rows * s.padded, s.padded);
    }
  }

  // Joins a chunk's split to its rows, or keeps it for others to join.
  void keep(const Unit& unit, int32_t split, const Chunk& c) {
    const Work& w = *unit.work;
    const int32_t num_rows = unit.heads * c.rows;
    if (w.partial < 0) {
      // Either one head or one chunk: its rows stand side by side.
      join({scratch.m + c.first, scratch.l + c.first, scratch.a + int64_t(c.first) * s.padded},
           {scratch.split_m, scratch.split_l, scratch.split}, num_rows, s.padded);
      return;
    }
    for (int32_t i = 0; i < num_rows; ++i) {
      float* partial =
          partial_of(w, split, unit.kv_head + i / c.rows, c.first + i % c.rows);
      partial[0] = scratch.split_m[i];
      partial[1] = scratch.split_l[i];
      memcpy(partial + 16, scratch.split + int64_t(i) * s.padded, s.padded * sizeof(float));
    }
  }

  float* partial_of(const Work& w, int32_t split, int32_t kv_head, int32_t r) const {
    const int64_t tile = int64_t(split - w.first) * spec.kv.num_kv_heads + kv_head;
    return partial_at(s, w.partial + tile * w.count * s.group + r);
  }

  // The partial results of a tile's row, joined in ascending order.
  void join_row(const Work& w, int32_t kv_head, int32_t r) {
    *scratch.l = -1;
    for (int32_t split = w.first; split < w.last; ++split) {
      float* partial = partial_of(w, split, kv_head, r);
      join({scratch.m, scratch.l, scratch.a}, {partial, partial + 1, partial + 16}, 1, s.padded);
    }
    write_row(scratch.a, *scratch.l, output_row(w, kv_head, r));
  }

  float* output_row(const Work& w, int32_t kv_head, int32_t r) const {
    const int32_t head = kv_head * s.group + r % s.group;
    return out_ + (w.token + r / s.group) * out_stride_ + int64_t(head) * spec.kv.head_dim;
  }

  void write_row(const float* a, float l, float* out) const {
    const vf inverse = vset1(1.0f / l);
    const int32_t head_dim = spec.kv.head_dim;
    for (int32_t d = 0; d < head_dim; d += 16) {
      const vf y = vmul(vload(a + d), inverse);
      if (d + 16 <= head_dim) {
        vstore(out + d, y);
      } else {
        vstore_n(out + d, y, head_dim - d);
      }
    }
  }

  const AttentionState& s;
  const AttentionSpec& spec;
  const pll_batch& batch_;
  const pll_kv_group& group_;
  const pll_context* ctx;
  const float* q_;
  int64_t q_stride_;
  float* out_;
  int64_t out_stride_;
  const Element* k_;
  const Element* v_;
  const float* scales_;
  int64_t head_keys_, head_values_;  // elements of a block that are one head's
  int64_t head_groups_ = 0, num_units_ = 0, grab_ = 1, next_ = 0, end_ = 0;
  Scratch scratch;
  SplitView<Element> view_{};
  int32_t next_head_ = 0;  // of what is fetched ahead
};

#if PLL_ISA >= PLL_ISA_AVX512_BF16
using StoredBf16Reader = Bf16Reader;
#else
using StoredBf16Reader = FloatReader<uint16_t>;
#endif

int check_attention(void* state, const pll_tensor* buffers, int32_t num_buffers,
                    int32_t max_num_tokens, int32_t, char* error, size_t error_size) {
  const AttentionSpec& spec = static_cast<AttentionState*>(state)->spec;
  const KVLayout& kv = spec.kv;
  const int64_t width = int64_t(spec.num_heads) * kv.head_dim;
  const BufferNeed needs[] = {
      {"qkv", PLL_F32, max_num_tokens, width},
      {"out", PLL_F32, max_num_tokens, width},
      {"k_cache", kv.dtype, 0, kv_elements(kv, KVPart::KEYS)},
      {"v_cache", kv.dtype, 0, kv_elements(kv, KVPart::VALUES)},
      {"kv_scales", PLL_F32, 0, kv_elements(kv, KVPart::SCALES)},
  };
  return check_buffers(needs, kv.dtype == PLL_I8 ? 5 : 4, buffers, num_buffers, error, error_size);
}

void run_attention(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
                   const pll_context* ctx) {
  const AttentionState& s = *static_cast<AttentionState*>(state);
  if (ctx->num_threads > s.num_threads || ctx->scratch_bytes < scratch_of(s)) {
    ctx->fail(ctx, "attention: its op was finished in another Program since; make an op for each");
    return;
  }
  if (s.spec.kv.dtype == PLL_BF16) {
    Runner<StoredBf16Reader>(s, batch, buffers, ctx).run();
  } else if (s.spec.kv.dtype == PLL_I8) {
    Runner<Int8Reader>(s, batch, buffers, ctx).run();
  } else {
    Runner<FloatReader<float>>(s, batch, buffers, ctx).run();
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
  s->unit_rows = rows_of_a_unit(s->group);
  s->packs = PLL_ISA >= PLL_ISA_AVX512_BF16 && spec.kv.dtype == PLL_BF16;
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

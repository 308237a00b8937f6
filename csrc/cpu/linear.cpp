// The linear op: how threads share it, the epilogue, the factory (parts: see linear_impl.h).
//
// Phase 1 prepares the input rows.  A few rows are prepared by every thread for itself, which
// costs less than a barrier; many are shared out, each thread's rows standing in its own scratch.
// Phase 2 hands out tiles of panels by rows.  A tile runs over the columns in blocks, so that a
// block of its weights stays in cache while all its rows pass.

#include <stdlib.h>

#include <stdexcept>

#include "cpu/buffers.h"
#include "linear_impl.h"
#include "linear_outliers.h"
#include "simd_int.h"

namespace pyllmlite::PLL_NS {
namespace {

// Prepared rows that each thread makes for itself: below it a barrier costs more.
constexpr int64_t LOCAL_VALUES = 4096, LOCAL_BYTES = 32 * 1024;
constexpr int64_t BLOCK_ROWS = 96;          // a multiple of every max_rows
constexpr int64_t TILE_WIDTH = 4;           // panels to a tile
constexpr int64_t PARTY_ROWS = 48;         // prepared by a thread, from which on it keeps to them
constexpr int32_t COUNTERS = 4;            // that an op has
constexpr int64_t MAX_SEGMENT = 65536;      // 255 * 127 * MAX_SEGMENT fits int32

struct Piece;

struct Linear {
  LinearState state;
  TileKernel kernels[MAX_ROWS + 1][3];  // 1, TILE_PANELS, WIDE_PANELS panels
  void (*write)(const LinearSpec& spec, const Piece& piece);
};

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// --- epilogue --------------------------------------------------------------------------------

// erfc(z) for z >= 0 as t e^(-z^2 + P(t)), t = 1 / (1 + z / 2): Press et al., Numerical Recipes
// in C (1992), section 6.2, fractional error below 1.2e-7.
vf erfc_positive(vf z) {
  const vf t = vdiv(vset1(1.0f), vfma(z, vset1(0.5f), vset1(1.0f)));
  vf p = vset1(0.17087277f);
  p = vfma(p, t, vset1(-0.82215223f));
  p = vfma(p, t, vset1(1.48851587f));
  p = vfma(p, t, vset1(-1.13520398f));
  p = vfma(p, t, vset1(0.27886807f));
  p = vfma(p, t, vset1(-0.18628806f));
  p = vfma(p, t, vset1(0.09678418f));
  p = vfma(p, t, vset1(0.37409196f));
  p = vfma(p, t, vset1(1.00002368f));
  p = vfma(p, t, vset1(-1.26551223f));
  return vmul(t, vexp(vfma(vsub(vzero(), z), z, p)));
}

template <Activation KIND>
PLL_INLINE vf activate(vf x) {
  switch (KIND) {
    case Activation::NONE:
      return x;
    case Activation::SILU:
      return vdiv(x, vadd(vset1(1.0f), vexp(vsub(vzero(), x))));
    case Activation::GELU: {  // x Phi(x), Phi(-|x|) = erfc(|x| / sqrt 2) / 2
      const vf tail = vmul(vset1(0.5f), erfc_positive(vmul(vabs(x), vset1(0.70710678f))));
      const vf body = vsub(vset1(1.0f), tail);
      return vmul(x, vselect_gt(x, vzero(), body, tail));
    }
    case Activation::GELU_TANH: {
      const vf cube = vmul(vmul(x, x), x);
      const vf inner = vmul(vset1(0.797884561f), vfma(vset1(0.044715f), cube, x));
      return vmul(vmul(vset1(0.5f), x), vadd(vset1(1.0f), vtanh(inner)));
    }
    case Activation::RELU:
      return vmax(vzero(), x);  // NaN stays
  }
  return x;
}

// Scale, bias and softcap of panel lanes whose first weight row (before gating) is `column`.
vf finish(const LinearSpec& spec, vf v, int64_t column, int64_t count) {
  if (spec.output_scale != 1.0f) v = vmul(v, vset1(spec.output_scale));
  if (spec.bias) v = vadd(v, vload_n(spec.bias + column, count));
  if (spec.softcap > 0) {
    v = vmul(vset1(spec.softcap), vtanh(vdiv(v, vset1(spec.softcap))));
  }
  return v;
}

// Some rows of a tile: sums, and where their outputs go.
struct Piece {
  const float* acc;
  int64_t acc_stride;
  float* out;
  int64_t out_stride;
  int64_t rows;
  int64_t first, panels;  // of the weight
};

template <Activation KIND, bool GATED>
void write_piece(const LinearSpec& spec, const Piece& piece) {
  const Piece p = piece;  // a copy, which no store to the output can change
  constexpr int64_t STEP = GATED ? 2 : 1;
  const int64_t columns = spec.weight.n / STEP;
  const bool plain = spec.output_scale == 1.0f && !spec.bias && !(spec.softcap > 0);
  const bool residual = spec.residual, multiply = spec.multiply;
  for (int64_t r = 0; r < p.rows; ++r) {
    const float* acc = p.acc + r * p.acc_stride;
    float* const out = p.out + r * p.out_stride;
    int64_t column = p.first / STEP * 16;
    const int64_t end = column + p.panels / STEP * 16;
    for (; column < end; column += 16, acc += STEP * 16) {
      const int64_t count = at_most(16, columns - column);
      float* const to = out + column;
      vf v = vload(acc);
      if (!plain) v = finish(spec, v, column, count);
      v = activate<KIND>(v);
      if (GATED) {
        vf up = vload(acc + 16);
        if (!plain) up = finish(spec, up, columns + column, count);
        v = vmul(v, up);
      }
      if (residual) v = vadd(vload_n(to, count), v);
      if (multiply) v = vmul(vload_n(to, count), v);
      if (count == 16) {
        vstore(to, v);
      } else {
        vstore_n(to, v, count);
      }
    }
  }
}

typedef void (*WritePiece)(const LinearSpec&, const Piece&);

template <bool GATED>
WritePiece find_write(Activation kind) {
  switch (kind) {
    case Activation::NONE: return write_piece<Activation::NONE, GATED>;
    case Activation::SILU: return write_piece<Activation::SILU, GATED>;
    case Activation::GELU: return write_piece<Activation::GELU, GATED>;
    case Activation::GELU_TANH: return write_piece<Activation::GELU_TANH, GATED>;
    case Activation::RELU: return write_piece<Activation::RELU, GATED>;
  }
  return nullptr;
}

// --- tiles -----------------------------------------------------------------------------------

// What a kernel asks the memory for: the panels behind its own, or a fixed way ahead in them.
void ask_ahead(const LinearState& s, int64_t width, bool first, TileArgs* args) {
  args->ahead = args->ahead_scales = 0;
  if (!first) return;
  if (s.segment_bytes == 0) {
    args->ahead = 1024;
  } else if (width == 1) {
    args->ahead = STREAM_AHEAD;
    args->ahead_scales = STREAM_AHEAD / s.segment_bytes / s.row.segments_per_group * 16;
  } else {
    args->ahead = width * s.panel_bytes;
    args->ahead_scales = width * s.panel_scales;
  }
}

// Prepared rows of one thread that pass a register tile together.
struct RowGroup {
  const uint8_t* rows;
  int64_t count;
};

// Rows [begin, end) of a step, at most BLOCK_ROWS, cut into groups that are about equal and lie
// within a slice.  Returns their number.
int64_t cut_rows(const LinearState& s, const uint8_t* const* slices, int64_t slice, int64_t begin,
                 int64_t end, RowGroup* groups) {
  int64_t n = 0;
  while (begin < end) {
    const int64_t which = begin / slice;
    const int64_t stop = at_most((which + 1) * slice, end);
    const int64_t parts = (stop - begin + s.max_rows - 1) / s.max_rows;
    for (int64_t left = parts; left > 0; --left) {
      const int64_t count = (stop - begin + left - 1) / left;
      groups[n++] = RowGroup{slices[which] + (begin - which * slice) * s.row.bytes, count};
      begin += count;
    }
  }
  return n;
}

// acc [rows][TILE_WIDTH * 16] = the groups' rows times `panels` panels from panel `first`.
// out [rows], `out_stride` apart, is where the outputs will go: its lines are asked for on the way.
void run_tile(const Linear& op, const RowGroup* groups, int64_t num_groups, int64_t num_rows,
              int64_t first, int64_t panels, float* acc, const float* out, int64_t out_stride) {
  const LinearState& s = op.state;
  const PackedLinear& weight = s.spec.weight;
  constexpr int64_t STRIDE = TILE_WIDTH * 16;
  memset(acc, 0, static_cast<size_t>(num_rows * STRIDE) * sizeof(float));
  const int64_t k_block = num_groups > 1 ? s.k_block : s.row.k;
  // Float rows of few weights wait for their own sums, which several panels hide.
  const bool float_rows = s.row.type != RowType::INT8;
  const bool stream = !float_rows && num_rows <= STREAM_ROWS;
  TileArgs args;
  args.panel_bytes = s.panel_bytes;
  args.panel_scales = s.panel_scales;
  args.row = &s.row;
  args.packed = &weight;
  args.acc_stride = STRIDE;
  const int64_t step = s.spec.gated ? 2 : 1;
  out += first / step * 16;
  for (int64_t k = 0; k < s.row.k; k += k_block) {
    args.k0 = k;
    args.k1 = at_most(k + k_block, s.row.k);
    for (int64_t p = 0; p < panels;) {
      const int64_t left = panels - p;
      int kind = left >= TILE_PANELS && !stream;
      if (float_rows && num_rows <= WIDE_ROWS && left >= WIDE_PANELS) kind = 2;
      const int64_t width = kind == 2 ? WIDE_PANELS : kind == 1 ? TILE_PANELS : 1;
      args.weight = static_cast<const uint8_t*>(weight.data) + (first + p) * s.panel_bytes;
      args.scales = scales_at(weight, weight.scales, (first + p) * s.panel_scales);
      args.mins = scales_at(weight, weight.mins, (first + p) * s.panel_scales);
      args.acc = acc + p * 16;
      const bool at_last = args.k1 == s.row.k && p + width == panels && num_groups > 1;
      for (int64_t g = 0; g < num_groups; ++g) {
        if (at_last) {
          for (int64_t r = 0; r < groups[g].count; ++r, out += out_stride)
            for (int64_t c = 0; c < panels / step * 16; c += 16) prefetch_l2(out + c);
        }
        // The first rows bring the weights; for those behind them `ahead` is what is there.
        ask_ahead(s, width, g == 0, &args);
        args.rows = groups[g].rows;
        op.kernels[groups[g].count][kind](args);
        args.acc += groups[g].count * STRIDE;
      }
      p += width;
    }
  }
  if (s.row.outliers_at == 0) return;
  for (int64_t g = 0; g < num_groups; ++g) {
    add_outliers(s, groups[g].rows, groups[g].count, first, panels, acc, STRIDE);
    acc += groups[g].count * STRIDE;
  }
}

struct Span {
  int64_t first, last;
};

// The tiles of some rows.  A block of rows meets all weights before the next one does: its rows
// stay in cache.
struct Tiles {
  const Linear* op;
  const uint8_t* const* slices;
  int64_t slice;
  const pll_tensor* out;
  float* acc;
  int64_t begin = 0, end = 0, block = 0, count = 0, chunk = 1;
  // Of a block: first tiles of `width` panels, then of `tail`.
  int64_t first_panel = 0, last_panel = 0, width = 1, tail = 1, wide = 0, panel_tiles = 1;
  int64_t cut = -1;  // the row whose block `groups` are of
  int64_t num_groups = 0;
  RowGroup groups[BLOCK_ROWS];

  // Rows by panels, for some threads to share.
  void set(Span rows, Span panels, int64_t threads) {
    const LinearState& s = op->state;
    begin = rows.first;
    end = rows.last;
    first_panel = panels.first;
    last_panel = panels.last;
    cut = -1;
    count = 0;
    const int64_t num_rows = end - begin, num_panels = last_panel - first_panel;
    if (num_rows <= 0 || num_panels <= 0) return;
    const int64_t blocks = (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    block = round_up((num_rows + blocks - 1) / blocks, s.max_rows);
    const int64_t narrowest = s.spec.gated ? 2 : 1;
    width = TILE_WIDTH;
    while (width > narrowest && (num_panels + width - 1) / width * blocks < 4 * threads) {
      width /= 2;
    }
    wide = num_panels / width;
    tail = width;
    if (blocks == 1 && threads > 1) {
      // What does not give every thread as many tiles is cut narrower: else all wait for the last.
      wide = wide / threads * threads;
      const int64_t rest = num_panels - wide * width;
      tail = at_most(round_up((rest + threads - 1) / threads, 2), width);
    }
    panel_tiles = wide + (tail > 0 ? (num_panels - wide * width + tail - 1) / tail : 0);
    count = panel_tiles * blocks;
    chunk = 1 + count / (threads * 16);
  }

  void run(int64_t tile) {
    const LinearState& s = op->state;
    const int64_t at = tile % panel_tiles, row = begin + tile / panel_tiles * block;
    const int64_t first = first_panel + (at < wide ? at * width : wide * width + (at - wide) * tail);
    const int64_t panels = at_most(at < wide ? width : tail, last_panel - first);
    const int64_t rows = at_most(block, end - row);
    if (rows <= 0) return;
    if (cut != row) num_groups = cut_rows(s, slices, slice, row, row + rows, groups);
    cut = row;
    const int64_t stride = out->stride[0];
    float* const to = static_cast<float*>(out->data) + row * stride;
    run_tile(*op, groups, num_groups, rows, first, panels, acc, to, stride);
    op->write(s.spec, Piece{acc, TILE_WIDTH * 16, to, stride, rows, first, panels});
  }
};

bool overlap(const pll_tensor& a, const pll_tensor& b, int64_t rows) {
  const char* a0 = static_cast<const char*>(a.data);
  const char* b0 = static_cast<const char*>(b.data);
  const int64_t a_size = rows * a.stride[0] * 4, b_size = rows * b.stride[0] * 4;
  return a0 < b0 + b_size && b0 < a0 + a_size;
}

const float* input_row(const LinearSpec& spec, const pll_batch* batch, const pll_tensor& x,
                       int64_t row) {
  const int64_t from = spec.logit_rows ? batch->logit_rows[row] : row;
  return static_cast<const float*>(x.data) + from * x.stride[0];
}

int check_linear(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t max_num_tokens,
                 int32_t max_logit_rows, char* error, size_t error_size) {
  const LinearSpec& spec = static_cast<Linear*>(state)->state.spec;
  const int64_t columns = spec.gated ? spec.weight.n / 2 : spec.weight.n;
  const BufferNeed needs[] = {
      {"x", PLL_F32, max_num_tokens, spec.weight.k},
      {"out", PLL_F32, spec.logit_rows ? max_logit_rows : max_num_tokens, columns},
  };
  return check_buffers(needs, 2, buffers, num_buffers, error, error_size);
}

void run_linear(void* pointer, const pll_batch* batch, const pll_tensor* buffers, int32_t,
                const pll_context* ctx) {
  const Linear& op = *static_cast<const Linear*>(pointer);
  const LinearState& s = op.state;
  const pll_tensor& x = buffers[0];
  const pll_tensor& out = buffers[1];
  const int64_t rows = s.spec.logit_rows ? batch->num_logit_rows : batch->num_tokens;
  const int32_t threads = ctx->num_threads;
  if (rows <= 0) return;
  uint8_t* scratch = static_cast<uint8_t*>(ctx->scratch);
  uint8_t* own_rows = scratch + s.rows_at;
  float* temp = reinterpret_cast<float*>(scratch);
  float* acc = reinterpret_cast<float*>(scratch + s.acc_at);

  const bool local =
      rows <= s.local_rows &&
      (threads == 1 || (rows * s.row.k <= LOCAL_VALUES && !overlap(x, out, batch->num_tokens)));
  const int64_t slice = local ? rows : round_up((rows + threads - 1) / threads, s.max_rows);
  if (!local && (slice > s.slice_rows || threads > s.num_slices)) {
    ctx->fail(ctx, "linear: more rows or threads than the Program was finished for");
    return;
  }
  const int64_t begin = local ? 0 : at_most(ctx->thread * slice, rows);
  const int64_t end = at_most(begin + slice, rows);
  for (int64_t r = begin; r < end; ++r) {
    prepare_row(s, input_row(s.spec, batch, x, r), temp, own_rows + (r - begin) * s.row.bytes);
  }
  const uint8_t* const* slices = s.slices;
  const uint8_t* own = own_rows;
  if (local) {
    slices = &own;
  } else {
    s.slices[ctx->thread] = own_rows;
    if (threads > 1) ctx->barrier(ctx);
  }

  Tiles tiles;
  tiles.op = &op;
  tiles.slices = slices;
  tiles.slice = slice;
  tiles.out = &out;
  tiles.acc = acc;
  // Threads keep to a part of their own, and help the others afterwards.  Where there are rows
  // enough for it, it is the rows that they prepared themselves: rows from another core's cache
  // cost more than weights read twice.  Else it is a stretch of the weights, which are then read in
  // one go.
  const bool by_rows = !local && slice >= PARTY_ROWS;
  const int32_t parties = threads < COUNTERS ? threads : COUNTERS;
  const int32_t own_party = ctx->thread * parties / threads;
  const int64_t pairs = (s.num_panels + 1) / 2;
  for (int32_t i = 0; i < parties; ++i) {
    const int32_t party = (own_party + i) % parties;
    Span some{0, rows}, panels{0, s.num_panels};
    if (by_rows) {
      // The first thread of a party is the first t with t * parties / threads == party.
      some.first = at_most((int64_t(party) * threads + parties - 1) / parties * slice, rows);
      some.last = at_most((int64_t(party + 1) * threads + parties - 1) / parties * slice, rows);
    } else {
      panels.first = at_most(party * pairs / parties * 2, s.num_panels);
      panels.last = at_most((party + 1) * pairs / parties * 2, s.num_panels);
    }
    tiles.set(some, panels, (threads + parties - 1) / parties);
    for (;;) {
      const int64_t from = ctx->fetch_add(ctx, party, tiles.chunk);
      if (from >= tiles.count) break;
      const int64_t to = at_most(from + tiles.chunk, tiles.count);
      for (int64_t tile = from; tile < to; ++tile) tiles.run(tile);
    }
  }
}

size_t linear_scratch(void* pointer, int32_t max_num_tokens, int32_t num_threads) {
  LinearState& s = static_cast<Linear*>(pointer)->state;
  free(s.slices);
  s.slices = static_cast<const uint8_t**>(calloc(static_cast<size_t>(num_threads), sizeof(void*)));
  s.num_slices = s.slices ? num_threads : 0;
  s.slice_rows = round_up((max_num_tokens + num_threads - 1) / num_threads, s.max_rows);
  const int64_t rows = s.slice_rows > s.local_rows ? s.slice_rows : s.local_rows;
  return static_cast<size_t>(s.rows_at + rows * s.row.bytes);
}

void destroy_linear(void* pointer) {
  if (!pointer) return;
  free(static_cast<Linear*>(pointer)->state.slices);
  free(pointer);
}

// --- factory ---------------------------------------------------------------------------------

// The segment: the smaller of the weight's and the activation's group, cut to at most `limit`
// columns where it can be.  0 where the two do not fit each other.
int64_t segment_of(int64_t k, int64_t weight_group, int64_t activation_group, int64_t limit) {
  const bool whole_weight = weight_group >= k, whole_activation = activation_group >= k;
  int64_t segment;
  if (whole_weight || whole_activation) {
    if (whole_weight && whole_activation) return at_most(limit, k);
    segment = whole_weight ? activation_group : weight_group;
  } else {
    segment = at_most(weight_group, activation_group);
    if (weight_group % segment != 0 || activation_group % segment != 0) return 0;
  }
  for (int64_t parts = 1; segment / parts >= 32; ++parts) {
    if (segment % parts == 0 && segment / parts <= limit && segment / parts % 8 == 0) {
      return segment / parts;
    }
  }
  return segment <= MAX_SEGMENT ? segment : 0;
}

// 32 columns, whose rounding costs half of what 64 do (KL divergence, benchmarks/RESULTS.md), or the
// weight's group where 32 does not divide it.
int64_t own_activation_group(int64_t k, int64_t weight_group) {
  return weight_group >= k || weight_group % 32 == 0 ? 32 : weight_group;
}

int64_t value_bytes(RowType type) {
  switch (type) {
    case RowType::F32: return 4;
    case RowType::BF16: return PLL_ISA >= PLL_ISA_AVX512_BF16 ? 2 : 4;
    case RowType::INT8: return 1;
  }
  return 4;
}

void set_layout(LinearState* s) {
  const LinearSpec& spec = s->spec;
  const PackedLinear& w = spec.weight;
  const int64_t k = w.k;
  const bool quantized = has_groups(w.format);
  const int64_t half = spec.gated ? w.n / 2 : w.n;
  s->num_panels = (half + 15) / 16 * (spec.gated ? 2 : 1);
  RowLayout& row = s->row;
  row.k = k;
  row.segment = k;
  row.num_segments = 0;
  row.segments_per_group = row.segments_per_activation_group = 1;
  row.type = RowType::F32;
  s->max_rows = quantized && spec.int8_activations ? MAX_INT_ROWS : MAX_ROWS;
  s->panel_scales = s->segment_bytes = 0;
  switch (w.format) {
    case WeightFormat::F32:
      s->panel_bytes = k * 64;
      s->k_block = 256;
      break;
    case WeightFormat::BF16:
      row.type = RowType::BF16;
      s->panel_bytes = (k + 1) / 2 * 64;
      s->k_block = 512;
      break;
    case WeightFormat::INT8:
      s->panel_bytes = (k + 3) / 4 * 64;
      s->k_block = 1024;
      break;
    case WeightFormat::INT4:
    case WeightFormat::CODEBOOK4:
      s->panel_bytes = (k + 7) / 8 * 64;
      s->k_block = 1024;
      break;
  }
  if (quantized) {
    const int64_t group = w.group_size == 0 || w.group_size >= k ? k : w.group_size;
    s->panel_scales = (k + group - 1) / group * 16;
    int64_t activation = k;
    if (spec.bf16_activations) {
      row.type = RowType::BF16;
      if (w.format != WeightFormat::INT8) s->max_rows = MAX_NIBBLE_ROWS;
      // Rounded here, so that every instruction set multiplies the same values.
      for (float& value : s->spec.weight.codebook) value = bf16_to_f32(f32_to_bf16(value));
    }
    if (spec.int8_activations) {
      row.type = RowType::INT8;
      row.raised = w.format == WeightFormat::INT8 ? I8_OFFSET : w.mins ? 0 : 8;
      activation = spec.activation_group != 0 ? spec.activation_group : own_activation_group(k, group);
      if (activation < k && activation % 8 != 0 && activation != group) {
        throw std::invalid_argument("linear: activation_group must be a multiple of 8");
      }
    }
    row.segment = segment_of(k, group, activation, spec.int8_activations ? 1024 : 256);
    if (row.segment == 0) {
      throw std::invalid_argument(
          "linear: of activation_group and the weight's group_size one must divide the other");
    }
    row.num_segments = (k + row.segment - 1) / row.segment;
    row.segments_per_group = group < k ? group / row.segment : row.num_segments;
    row.segments_per_activation_group =
        activation < k ? activation / row.segment : row.num_segments;
    // Where the weight has one group, a last pair may be a single segment.
    row.pairs = row.type == RowType::INT8 &&
                (group < k ? row.segments_per_group % 2 == 0 : row.num_segments > 1);
    s->segment_bytes = row.segment * (w.format == WeightFormat::INT8 ? 16 : 8);
    const int64_t target = spec.int8_activations ? 1024 : 256;
    s->k_block = row.segment * (row.segment < target ? target / row.segment : 1);
    if (row.pairs) s->k_block = round_up(s->k_block, 2 * row.segment);
  }
  const int64_t arrays = row.num_segments * 4;
  row.scale_at = round_up((k + 16) * value_bytes(row.type), 64);
  row.start_at = row.scale_at + (row.type == RowType::INT8 ? arrays : 0);
  row.sum_at = row.start_at + (row.type == RowType::INT8 ? arrays : 0);
  row.bytes = round_up(row.sum_at + arrays, 64);
  s->local_rows = LOCAL_BYTES / row.bytes;  // outliers do not count: few of them are read
  if (spec.outlier_threshold > 0) {
    row.outliers_at = row.bytes;
    row.bytes += outlier_bytes(k);
  }
  if (row.bytes % 128 == 0) row.bytes += 64;
  s->acc_at = round_up(2 * ((k + 31) / 16 * 16) * 4, 64);
  s->rows_at = s->acc_at + BLOCK_ROWS * TILE_WIDTH * 16 * 4;
}

void check(const LinearSpec& spec) {
  const PackedLinear& w = spec.weight;
  if (w.n <= 0 || w.k <= 0 || !w.data) throw std::invalid_argument("linear: empty weight");
  if (spec.gated && w.n % 2 != 0) {
    throw std::invalid_argument("linear: gated needs an even number of weight rows");
  }
  const bool quantized = has_groups(w.format);
  if (quantized && !w.scales) throw std::invalid_argument("linear: codes need scales");
  const int64_t unit = w.format == WeightFormat::INT8 ? 4 : 8;
  if (quantized && (w.group_size < 0 || (w.group_size < w.k && w.group_size % unit != 0))) {
    throw std::invalid_argument(
        "linear: group_size must be a multiple of 8 (int4) or 4 (int8), or 0");
  }
  if (spec.activation_group < 0) {
    throw std::invalid_argument("linear: activation_group must not be negative");
  }
  if (spec.outlier_threshold > 0 &&
      !(spec.int8_activations && w.format == WeightFormat::INT8 && !w.mins &&
        (w.group_size == 0 || w.group_size >= w.k))) {
    throw std::invalid_argument(
        "linear: outliers need int8 activations and a symmetric int8 weight without groups");
  }
  if (spec.int8_activations && (!quantized || w.format == WeightFormat::CODEBOOK4)) {
    throw std::invalid_argument("linear: int8 activations need an int8 or int4 weight");
  }
  if (spec.bf16_activations && (spec.int8_activations || w.format == WeightFormat::F32)) {
    throw std::invalid_argument(
        "linear: bf16 activations need a bf16, int8, int4 or codebook4 weight and exclude int8 "
        "activations");
  }
}

TileKernel find_kernel(WeightFormat format, RowType type, int rows, int panels) {
  if (!has_groups(format)) return float_kernel(format, rows, panels);
  switch (type) {
    case RowType::INT8: return int8_rows_kernel(format, rows, panels);
    case RowType::BF16: return bf16_rows_kernel(format, rows, panels);
    case RowType::F32: return float_rows_kernel(format, rows, panels);
  }
  return nullptr;
}

}  // namespace

pll_op make_linear(const LinearSpec& spec) {
  check(spec);
  Linear* linear = static_cast<Linear*>(calloc(1, sizeof(Linear)));
  if (!linear) throw std::runtime_error("linear: out of memory");
  linear->state.spec = spec;
  try {
    set_layout(&linear->state);
  } catch (...) {
    free(linear);
    throw;
  }
  linear->write = spec.gated ? find_write<true>(spec.activation) : find_write<false>(spec.activation);
  const WeightFormat format = spec.weight.format;
  const int panels[3] = {1, TILE_PANELS, WIDE_PANELS};
  for (int rows = 1; rows <= static_cast<int>(linear->state.max_rows); ++rows) {
    for (int i = 0; i < 3; ++i) {
      linear->kernels[rows][i] =
          find_kernel(format, linear->state.row.type, rows, panels[i]);
    }
  }
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "linear";
  op.state = linear;
  op.scratch_bytes = linear_scratch;
  op.run = run_linear;
  op.check = check_linear;
  op.destroy = destroy_linear;
  return op;
}

}  // namespace pyllmlite::PLL_NS

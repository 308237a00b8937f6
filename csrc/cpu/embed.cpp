// Token embeddings: rows gathered from a packed matrix of any format.

#include <stdlib.h>

#include <stdexcept>

#include "cpu/buffers.h"
#include "simd.h"

namespace pyllmlite::PLL_NS {
namespace {

struct Embed {
  EmbedSpec spec;
  int64_t panel_bytes;
  int64_t group;
  int64_t num_groups;
};

// out[i] = scale * table[row][i] + (position ? position[i] : 0)
void gather(const Embed& op, int64_t row, const float* position, float* out) {
  const PackedLinear& t = op.spec.table;
  const float scale = op.spec.scale;
  const int64_t lane = row % 16;
  const uint8_t* panel = static_cast<const uint8_t*>(t.data) + row / 16 * op.panel_bytes;
  switch (t.format) {
    case WeightFormat::F32: {
      const float* from = reinterpret_cast<const float*>(panel) + lane;
      for (int64_t i = 0; i < t.k; ++i) out[i] = scale * from[i * 16];
      break;
    }
    case WeightFormat::BF16: {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(panel) + lane * 2;
      for (int64_t i = 0; i < t.k; ++i) out[i] = scale * bf16_to_f32(from[i / 2 * 32 + i % 2]);
      break;
    }
    case WeightFormat::INT8:
    case WeightFormat::INT4: {
      const bool int4 = t.format == WeightFormat::INT4;
      const uint8_t* from = panel + lane * 4;
      for (int64_t g = 0; g < op.num_groups; ++g) {
        const int64_t at = (row / 16 * op.num_groups + g) * 16 + lane;
        const float step = f16_to_f32(t.scales[at]);
        const float min = t.mins ? f16_to_f32(t.mins[at]) : int4 ? -8.0f * step : 0.0f;
        const int64_t end = (g + 1) * op.group < t.k ? (g + 1) * op.group : t.k;
        for (int64_t i = g * op.group; i < end; ++i) {
          const int code = int4 ? (from[i / 8 * 64 + (i & 3)] >> (i & 4)) & 15
                                : static_cast<int8_t>(from[i / 4 * 64 + (i & 3)]);
          out[i] = scale * (step * static_cast<float>(code) + min);
        }
      }
      break;
    }
  }
  if (position) {
    for (int64_t i = 0; i < t.k; ++i) out[i] = out[i] + position[i];
  }
}

int check_embed(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t max_num_tokens,
                int32_t, char* error, size_t error_size) {
  const BufferNeed need{"out", PLL_F32, max_num_tokens,
                        static_cast<Embed*>(state)->spec.table.k};
  return check_buffers(&need, 1, buffers, num_buffers, error, error_size);
}

void run_embed(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
               const pll_context* ctx) {
  const Embed& op = *static_cast<const Embed*>(state);
  const EmbedSpec& spec = op.spec;
  const pll_tensor& out = buffers[0];
  for (int32_t t = ctx->thread; t < batch->num_tokens; t += ctx->num_threads) {
    const int64_t token = batch->token_ids[t];
    if (token < 0 || token >= spec.table.n) {
      ctx->fail(ctx, "embed: a token id is outside the vocabulary");
      return;
    }
    const float* position = nullptr;
    if (spec.position_table) {
      const int64_t row = batch->positions[t] + spec.position_offset;
      if (row < 0 || row >= spec.num_positions) {
        ctx->fail(ctx, "embed: a position is outside the position table");
        return;
      }
      position = spec.position_table + row * spec.table.k;
    }
    gather(op, token, position, static_cast<float*>(out.data) + t * out.stride[0]);
  }
}

void destroy_embed(void* state) { free(state); }

}  // namespace

pll_op make_embed(const EmbedSpec& spec) {
  const PackedLinear& t = spec.table;
  if (t.n <= 0 || t.k <= 0 || !t.data) throw std::invalid_argument("embed: empty table");
  const bool quantized = t.format == WeightFormat::INT8 || t.format == WeightFormat::INT4;
  if (quantized && !t.scales) throw std::invalid_argument("embed: int8 and int4 need scales");
  Embed* embed = static_cast<Embed*>(calloc(1, sizeof(Embed)));
  if (!embed) throw std::runtime_error("embed: out of memory");
  embed->spec = spec;
  switch (t.format) {
    case WeightFormat::F32: embed->panel_bytes = t.k * 64; break;
    case WeightFormat::BF16: embed->panel_bytes = (t.k + 1) / 2 * 64; break;
    case WeightFormat::INT8: embed->panel_bytes = (t.k + 3) / 4 * 64; break;
    case WeightFormat::INT4: embed->panel_bytes = (t.k + 7) / 8 * 64; break;
  }
  embed->group = t.group_size == 0 || t.group_size >= t.k ? t.k : t.group_size;
  embed->num_groups = (t.k + embed->group - 1) / embed->group;
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "embed";
  op.state = embed;
  op.run = run_embed;
  op.check = check_embed;
  op.destroy = destroy_embed;
  return op;
}

}  // namespace pyllmlite::PLL_NS

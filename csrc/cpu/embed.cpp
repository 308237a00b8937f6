// Token embeddings: rows gathered from a packed matrix of any format.

#include <stdlib.h>

#include <stdexcept>

#include "cpu/buffers.h"
#include "unpack.h"

namespace pyllmlite::PLL_NS {
namespace {

struct Embed {
  EmbedSpec spec;
};

// out[i] = scale * table[row][i] + (position ? position[i] : 0)
void gather(const Embed& op, int64_t row, const float* position, float* out) {
  const PackedLinear& t = op.spec.table;
  const float scale = op.spec.scale;
  unpack_lane(t, row / 16, row % 16, out);
  for (int64_t i = 0; i < t.k; ++i) out[i] = scale * out[i];
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
  if (has_groups(t.format) && !t.scales) {
    throw std::invalid_argument("embed: codes need scales");
  }
  Embed* embed = static_cast<Embed*>(calloc(1, sizeof(Embed)));
  if (!embed) throw std::runtime_error("embed: out of memory");
  embed->spec = spec;
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

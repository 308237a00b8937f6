// Causal attention over pyllmlite's own cache layout, as plain as it can be written and still
// be shared over threads: one (token, head) at a time, online softmax (Milakov & Gimelshein
// 2018), so nothing but one row of accumulators is needed.
#include <cmath>
#include <utility>

#include "ops.h"

namespace {

size_t scratch_bytes(void* state, int32_t, int32_t) {
  return sizeof(float) * static_cast<AttentionParams*>(state)->head_dim;
}

int plan(void* state, const pll_batch* batch, char* error, size_t error_size) {
  const auto& p = *static_cast<const AttentionParams*>(state);
  if (p.kv_group < batch->num_kv_groups) return 0;
  // Plain C, no exception crosses: a message and a nonzero return end the step.
  const char message[] = "the step has no such KV group";
  for (size_t i = 0; i < sizeof(message) && i < error_size; ++i) error[i] = message[i];
  return 1;
}

void attend(const AttentionParams& p, const pll_batch& batch, const pll_tensor* buffers,
            int token, int head, float* sum) {
  const pll_kv_group& group = batch.kv_groups[p.kv_group];
  const int position = batch.positions[token];
  const int row = batch.rows[batch.seq_ids[token]];
  const int32_t* blocks = group.block_table + static_cast<int64_t>(row) * group.max_blocks;
  const int kv_head = head / (p.num_heads / p.num_kv_heads);
  const float* q = static_cast<const float*>(buffers[0].data) + token * buffers[0].stride[0] +
                   static_cast<int64_t>(head) * p.head_dim;
  float* out = static_cast<float*>(buffers[1].data) + token * buffers[1].stride[0] +
               static_cast<int64_t>(head) * p.head_dim;

  float largest = -INFINITY, weight_sum = 0;
  for (int d = 0; d < p.head_dim; ++d) sum[d] = 0;
  const int first = p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
  for (int key = first; key <= position; ++key) {
    const int64_t block = blocks[key / p.block_size];
    const int offset = key % p.block_size;
    const int64_t head_base = (block * p.num_kv_heads + kv_head) * p.head_dim * p.block_size;
    // K is transposed inside a block: [head_dim, block_size]; V is [block_size, head_dim].
    const float* k = static_cast<const float*>(buffers[2].data) + head_base + offset;
    const float* v = static_cast<const float*>(buffers[3].data) + head_base +
                     static_cast<int64_t>(offset) * p.head_dim;
    float score = 0;
    for (int d = 0; d < p.head_dim; ++d) score += q[d] * k[static_cast<int64_t>(d) * p.block_size];
    score *= p.scale;
    if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
    if (!p.alibi_slopes.empty()) score += p.alibi_slopes[head] * (key - position);
    if (score > largest) {
      const float shrink = std::exp(largest - score);
      for (int d = 0; d < p.head_dim; ++d) sum[d] *= shrink;
      weight_sum *= shrink;
      largest = score;
    }
    const float weight = std::exp(score - largest);
    for (int d = 0; d < p.head_dim; ++d) sum[d] += weight * v[d];
    weight_sum += weight;
  }
  for (int d = 0; d < p.head_dim; ++d) out[d] = sum[d] / weight_sum;
}

// Every thread of the pool is here at once; the shared counter deals the work out.
void run(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
         const pll_context* ctx) {
  const auto& p = *static_cast<const AttentionParams*>(state);
  const int64_t work = static_cast<int64_t>(batch->num_tokens) * p.num_heads;
  for (int64_t i; (i = ctx->fetch_add(ctx, 0, 1)) < work;) {
    attend(p, *batch, buffers, static_cast<int>(i / p.num_heads),
           static_cast<int>(i % p.num_heads), static_cast<float*>(ctx->scratch));
  }
}

}  // namespace

pll_op make_attention(AttentionParams params) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(op);
  op.name = "cpp_example_attention";
  op.state = new AttentionParams(std::move(params));
  op.scratch_bytes = scratch_bytes;
  op.plan = plan;
  op.run = run;
  op.destroy = [](void* state) { delete static_cast<AttentionParams*>(state); };
  return op;
}

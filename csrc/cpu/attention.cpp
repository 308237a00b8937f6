// Causal attention over the paged cache.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "factories.h"

namespace pyllmlite::PLL_NS {
namespace {

struct AttentionState {
  AttentionSpec spec;
};

inline float loaded(float value) { return value; }
inline float loaded(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

template <typename T>
void attend(const AttentionSpec& spec, const float* q, const int32_t* table, int32_t position,
            int32_t head, const T* k_cache, const T* v_cache, float* out) {
  const KVLayout& kv = spec.kv;
  const int32_t kv_head = head / (spec.num_heads / kv.num_kv_heads);
  const int32_t first =
      spec.window > 0 && position >= spec.window ? position - spec.window + 1 : 0;
  float max = -INFINITY, sum = 0;
  for (int32_t d = 0; d < kv.head_dim; ++d) out[d] = 0;
  for (int32_t j = first; j <= position; ++j) {
    const int64_t block = table[j / kv.block_size], offset = j % kv.block_size;
    const int64_t base = (block * kv.num_kv_heads + kv_head) * kv.head_dim * kv.block_size;
    float score = 0;
    for (int32_t d = 0; d < kv.head_dim; ++d) {
      score += q[d] * loaded(k_cache[base + int64_t(d) * kv.block_size + offset]);
    }
    score *= spec.scale;
    if (spec.softcap > 0) score = spec.softcap * tanhf(score / spec.softcap);
    if (spec.alibi_slopes) score += spec.alibi_slopes[head] * float(j - position);
    const float next = score > max || score != score ? score : max;
    const float keep = max == -INFINITY ? 0.0f : expf(max - next);
    const float p = expf(score - next);
    max = next;
    sum = sum * keep + p;
    for (int32_t d = 0; d < kv.head_dim; ++d) {
      out[d] = out[d] * keep + p * loaded(v_cache[base + offset * kv.head_dim + d]);
    }
  }
  for (int32_t d = 0; d < kv.head_dim; ++d) out[d] /= sum;
}

int plan_attention(void* state, const pll_batch* batch, char* error, size_t error_size) {
  const AttentionSpec& spec = static_cast<AttentionState*>(state)->spec;
  if (spec.kv_group >= batch->num_kv_groups) {
    snprintf(error, error_size, "attention: KV group %d, but the batch has %d", spec.kv_group,
             batch->num_kv_groups);
    return 1;
  }
  return 0;
}

void run_attention(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
                   const pll_context* ctx) {
  const AttentionSpec& spec = static_cast<AttentionState*>(state)->spec;
  const pll_kv_group& group = batch->kv_groups[spec.kv_group];
  const int64_t units = int64_t(batch->num_tokens) * spec.num_heads;
  for (int64_t u = ctx->thread; u < units; u += ctx->num_threads) {
    const int32_t t = static_cast<int32_t>(u / spec.num_heads);
    const int32_t head = static_cast<int32_t>(u % spec.num_heads);
    const int32_t* table =
        group.block_table + int64_t(batch->rows[batch->seq_ids[t]]) * group.max_blocks;
    const int64_t column = int64_t(head) * spec.kv.head_dim;
    const float* q = static_cast<const float*>(buffers[0].data) + t * buffers[0].stride[0] + column;
    float* out = static_cast<float*>(buffers[1].data) + t * buffers[1].stride[0] + column;
    if (spec.kv.dtype == PLL_BF16) {
      attend(spec, q, table, batch->positions[t], head,
             static_cast<const uint16_t*>(buffers[2].data),
             static_cast<const uint16_t*>(buffers[3].data), out);
    } else {
      attend(spec, q, table, batch->positions[t], head, static_cast<const float*>(buffers[2].data),
             static_cast<const float*>(buffers[3].data), out);
    }
  }
}

void destroy_attention(void* state) { delete static_cast<AttentionState*>(state); }

}  // namespace

pll_op make_attention(const AttentionSpec& spec) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "attention";
  op.state = new AttentionState{spec};
  op.plan = plan_attention;
  op.run = run_attention;
  op.destroy = destroy_attention;
  return op;
}

}  // namespace pyllmlite::PLL_NS

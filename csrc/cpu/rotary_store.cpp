// Per-head q/k norm, rotary position embedding (Su et al. 2021; half-split pairs as in
// GPT-NeoX), and the write of k and v into the paged cache.

#include <math.h>
#include <stdio.h>

#include "cpu/buffers.h"
#include "cpu/factories.h"
#include "cpu/simd.h"

namespace pyllmlite::PLL_NS {
namespace {

struct StoreState {
  RotaryStoreSpec spec;
};

void norm_head(float* x, int32_t n, const float* weight, float eps) {
  vf sum = vzero();
  for (int32_t i = 0; i < n; i += 16) {
    const vf v = vload_n(x + i, n - i);
    sum = vfma(v, v, sum);
  }
  const vf factor = vset1(1.0f / sqrtf(vreduce_add(sum) / static_cast<float>(n) + eps));
  for (int32_t i = 0; i < n; i += 16) {
    const vf v = vmul(vmul(vload_n(x + i, n - i), factor), vload_n(weight + i, n - i));
    vstore_n(x + i, v, n - i);
  }
}

void rotate_head(float* x, int32_t half, const float* cos, const float* sin) {
  int32_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const vf a = vload(x + i), b = vload(x + half + i), c = vload(cos + i), s = vload(sin + i);
    vstore(x + i, vsub(vmul(a, c), vmul(b, s)));
    vstore(x + half + i, vfma(b, c, vmul(a, s)));
  }
  if (i < half) {
    const int32_t n = half - i;
    const vf a = vload_n(x + i, n), b = vload_n(x + half + i, n);
    const vf c = vload_n(cos + i, n), s = vload_n(sin + i, n);
    vstore_n(x + i, vsub(vmul(a, c), vmul(b, s)), n);
    vstore_n(x + half + i, vfma(b, c, vmul(a, s)), n);
  }
}

// Column `offset` of keys [head_dim, block_size].
inline void store_keys(float* to, const float* k, int32_t n, int64_t stride) {
  for (int32_t i = 0; i < n; ++i) to[i * stride] = k[i];
}
inline void store_keys(uint16_t* to, const float* k, int32_t n, int64_t stride) {
  uint16_t rounded[16];
  for (int32_t i = 0; i < n; i += 16) {
    const int32_t count = n - i < 16 ? n - i : 16;
    vstore_bf16(rounded, vload_n(k + i, count));
    for (int32_t j = 0; j < count; ++j) to[(i + j) * stride] = rounded[j];
  }
}
inline void store_row(float* to, const float* v, int32_t n) { memcpy(to, v, sizeof(float) * n); }
inline void store_row(uint16_t* to, const float* v, int32_t n) {
  int32_t i = 0;
  for (; i + 16 <= n; i += 16) vstore_bf16(to + i, vload(v + i));
  for (; i < n; ++i) to[i] = f32_to_bf16(v[i]);
}

template <typename T>
void store_head(const KVLayout& kv, const float* k, const float* v, int64_t slot, int32_t head,
                T* k_cache, T* v_cache) {
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
  const int64_t base = (block * kv.num_kv_heads + head) * kv.head_dim * kv.block_size;
  T* keys = k_cache + base + offset;
  T* values = v_cache + base + offset * kv.head_dim;
  store_keys(keys, k, kv.head_dim, kv.block_size);
  store_row(values, v, kv.head_dim);
}

// Codes of a vector in `codes` (whole vectors of 16, zeros behind n); returns their scale.
float quantize_head(const float* x, int32_t n, int8_t* codes) {
  vf high = vzero(), special = vzero();
  for (int32_t i = 0; i < n; i += 16) {
    const vf v = vload_n(x + i, n - i);
    high = vmax(high, vabs(v));
    special = vfma(v, vzero(), special);  // NaN where v is not finite
  }
  const float largest = vreduce_max(high), nothing = vreduce_add(special);
  const bool finite = nothing == 0;
  // Below 1e-30 the inverse would overflow.
  const vf inverse = vset1(finite && largest >= 1e-30f ? 127.0f / largest : 0.0f);
  for (int32_t i = 0; i < n; i += 16) {
    float rounded[16];
    vstore(rounded, vround(vmul(vload_n(x + i, n - i), inverse)));
    for (int j = 0; j < 16; ++j) codes[i + j] = finite ? static_cast<int8_t>(rounded[j]) : 0;
  }
  return finite ? largest / 127.0f : NAN;
}

// k and v of a token's head as KVLayout has them in int8; `codes`: room for a head.
void store_codes(const KVLayout& kv, const float* k, const float* v, int64_t slot, int32_t head,
                 const pll_tensor* caches, int8_t* codes) {
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
  const int64_t at = block * kv.num_kv_heads + head, quads = (kv.head_dim + 3) / 4;
  int8_t* keys = static_cast<int8_t*>(caches[0].data) + (at * quads * kv.block_size + offset) * 4;
  int8_t* values = static_cast<int8_t*>(caches[1].data) + at * kv.head_dim * kv.block_size +
                   offset / 4 * 4 * kv.head_dim + offset % 4;
  float* scales = static_cast<float*>(caches[2].data) + at * 2 * kv.block_size + offset;
  scales[0] = quantize_head(k, kv.head_dim, codes);
  for (int64_t i = 0; i < quads; ++i) memcpy(keys + i * 4 * kv.block_size, codes + 4 * i, 4);
  scales[kv.block_size] = quantize_head(v, kv.head_dim, codes);
  for (int32_t i = 0; i < kv.head_dim; ++i) values[4 * i] = codes[i];
}

int plan_store(void* state, const pll_batch* batch, char* error, size_t error_size) {
  const RotaryStoreSpec& spec = static_cast<StoreState*>(state)->spec;
  if (spec.kv_group >= batch->num_kv_groups) {
    snprintf(error, error_size, "rotary_store: KV group %d, but the batch has %d", spec.kv_group,
             batch->num_kv_groups);
    return 1;
  }
  if (spec.rotary_dim == 0) return 0;
  for (int32_t i = 0; i < batch->num_seqs; ++i) {
    if (batch->seq_lens[i] > spec.num_positions) {
      snprintf(error, error_size, "rotary_store: position %d, but the tables hold %lld",
               batch->seq_lens[i] - 1, static_cast<long long>(spec.num_positions));
      return 1;
    }
  }
  return 0;
}

int check_store(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t max_num_tokens,
                int32_t, char* error, size_t error_size) {
  const RotaryStoreSpec& spec = static_cast<StoreState*>(state)->spec;
  const KVLayout& kv = spec.kv;
  const int64_t heads = int64_t(spec.num_heads) + 2 * int64_t(kv.num_kv_heads);
  const BufferNeed needs[] = {
      {"qkv", PLL_F32, max_num_tokens, saturating_product(heads, kv.head_dim)},
      {"k_cache", kv.dtype, 0, kv_elements(kv, KVPart::KEYS)},
      {"v_cache", kv.dtype, 0, kv_elements(kv, KVPart::VALUES)},
      {"kv_scales", PLL_F32, 0, kv_elements(kv, KVPart::SCALES)},
  };
  return check_buffers(needs, kv.dtype == PLL_I8 ? 4 : 3, buffers, num_buffers, error, error_size);
}

// Room for the codes of a head.
size_t store_scratch(void* state, int32_t, int32_t) {
  const KVLayout& kv = static_cast<StoreState*>(state)->spec.kv;
  return kv.dtype == PLL_I8 ? (size_t(kv.head_dim) + 15) / 16 * 16 : 0;
}

// Asks for the lines that a token's key and value of a head will be written to.  Transposed, a key
// has one in every row of its block: they come one by one, unless they were asked for long before.
void ask_for_slot(const KVLayout& kv, int64_t slot, int32_t head, const pll_tensor* caches) {
  if (slot < 0 || slot >= int64_t(kv.num_blocks) * kv.block_size) return;
  const int64_t dims = kv.dtype == PLL_I8 ? 4 : 1;  // of a key side by side
  const int64_t size = kv.dtype == PLL_F32 ? 4 : kv.dtype == PLL_BF16 ? 2 : 1;
  const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
  const int64_t at = block * kv.num_kv_heads + head;
  const int64_t row = kv.block_size * dims * size, key = (kv.head_dim + dims - 1) / dims * row;
  const char* const keys = static_cast<const char*>(caches[0].data) + at * key + offset * dims * size;
  for (int64_t i = 0; i < key; i += row < 64 ? 64 : row) __builtin_prefetch(keys + i, 1, 3);
  const int64_t value = kv.head_dim * size;
  const char* const values = static_cast<const char*>(caches[1].data) +
                             at * value * kv.block_size + offset / dims * dims * value;
  for (int64_t i = 0; i < dims * value; i += 64) __builtin_prefetch(values + i, 1, 3);
  if (kv.dtype != PLL_I8) return;
  const float* const scales = static_cast<const float*>(caches[2].data) + at * 2 * kv.block_size + offset;
  __builtin_prefetch(scales, 1, 3);
  __builtin_prefetch(scales + kv.block_size, 1, 3);
}

void run_store(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
               const pll_context* ctx) {
  const RotaryStoreSpec& spec = static_cast<StoreState*>(state)->spec;
  const KVLayout& kv = spec.kv;
  const pll_tensor& qkv = buffers[0];
  const int32_t* slots = batch->kv_groups[spec.kv_group].slot_mapping;
  const int32_t half = spec.rotary_dim / 2;
  const int32_t heads = spec.num_heads + kv.num_kv_heads;
  const int64_t threads = ctx->num_threads, tokens = batch->num_tokens;
  // Units of some tokens by one head: 16 where there are many, as neighbours share the cache lines
  // of transposed keys.
  int64_t size = tokens / (2 * threads);
  size = size < 1 ? 1 : size > 16 ? 16 : size;
  const int64_t chunks = (tokens + size - 1) / size, units = chunks * heads;
  // Few units are dealt out in turn: the keys' heads, which cost the most, are the last ones.
  const bool deal = chunks < threads;
  const int64_t begin = deal ? ctx->thread : units * ctx->thread / threads;
  const int64_t end = deal ? units : units * (ctx->thread + 1) / threads;
  auto ask_for_chunk = [&](int64_t chunk) {
    for (int64_t t = chunk * size; t < (chunk + 1) * size && t < tokens; ++t) {
      for (int32_t h = 0; h < kv.num_kv_heads; ++h) ask_for_slot(kv, slots[t], h, buffers + 1);
    }
  };
  if (!deal && begin < end) ask_for_chunk(begin / heads);
  for (int64_t u = begin; deal && u < end; u += threads) {
    const int32_t head = static_cast<int32_t>(u % heads);
    for (int64_t t = u / heads * size; head >= spec.num_heads && t < (u / heads + 1) * size && t < tokens; ++t) {
      ask_for_slot(kv, slots[t], head - spec.num_heads, buffers + 1);
    }
  }
  for (int64_t u = begin; u < end; u += deal ? threads : 1) {
    // All heads of some tokens one after the other: their rows are then still in cache.
    const int32_t head = static_cast<int32_t>(u % heads);
    const int64_t chunk = u / heads, first = chunk * size;
    const int64_t last = first + size < tokens ? first + size : tokens;
    if (!deal && head == 0 && u + heads < end) ask_for_chunk(chunk + 1);
    for (int64_t t = first; t < last; ++t) {
      float* row = static_cast<float*>(qkv.data) + t * qkv.stride[0];
      float* x = row + int64_t(head) * kv.head_dim;
      const bool is_key = head >= spec.num_heads;
      const int64_t position = batch->positions[t];
      const float* weight = is_key ? spec.k_norm : spec.q_norm;
      if (weight) norm_head(x, kv.head_dim, weight, spec.qk_norm_eps);
      if (half > 0) {
        if (position < 0 || position >= spec.num_positions) {
          ctx->fail(ctx, "rotary_store: a position lies outside of the cos/sin tables");
          return;
        }
        rotate_head(x, half, spec.cos + position * half, spec.sin + position * half);
      }
      if (!is_key) continue;
      const int64_t slot = slots[t];
      if (slot < 0) continue;
      if (slot >= int64_t(kv.num_blocks) * kv.block_size) {
        ctx->fail(ctx, "rotary_store: a slot lies outside of the cache");
        return;
      }
      const float* v = x + int64_t(kv.num_kv_heads) * kv.head_dim;
      const int32_t kv_head = head - spec.num_heads;
      if (kv.dtype == PLL_BF16) {
        store_head(kv, x, v, slot, kv_head, static_cast<uint16_t*>(buffers[1].data),
                   static_cast<uint16_t*>(buffers[2].data));
      } else if (kv.dtype == PLL_I8) {
        store_codes(kv, x, v, slot, kv_head, buffers + 1, static_cast<int8_t*>(ctx->scratch));
      } else {
        store_head(kv, x, v, slot, kv_head, static_cast<float*>(buffers[1].data),
                   static_cast<float*>(buffers[2].data));
      }
    }
  }
}

void destroy_store(void* state) { delete static_cast<StoreState*>(state); }

}  // namespace

pll_op make_rotary_store(const RotaryStoreSpec& spec) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "rotary_store";
  op.state = new StoreState{spec};
  op.scratch_bytes = store_scratch;
  op.plan = plan_store;
  op.run = run_store;
  op.check = check_store;
  op.destroy = destroy_store;
  return op;
}

}  // namespace pyllmlite::PLL_NS

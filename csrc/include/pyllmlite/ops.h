// The built-in CPU ops: what each fuses, which buffers it takes, what it computes.
//
// A factory returns a pll_op whose state it owns; pointers in a spec must outlive the op.
// The public factory picks the implementation for the instruction set in use; the
// implementations live in csrc/cpu, one file a family, compiled once per set.
// `tokens` below is batch.num_tokens; buffers are f32 [max_num_tokens, width] unless said.
#ifndef PYLLMLITE_OPS_H
#define PYLLMLITE_OPS_H

#include <cstdint>

#include "pyllmlite/export.h"
#include "pyllmlite/op.h"

namespace pyllmlite {

enum class WeightFormat : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3, CODEBOOK4 = 4 };

// A weight matrix [n, k] in the order the kernels read (made by pack_linear, see pack.h).
// INT8 and INT4 are w = scales[g] * code + mins[g], code in [-128, 127] or [0, 15],
// g = column / group_size; group_size 0: one group per row.  The last group may be short.
// With zero_points it is w = scales[g] * (code - mins[g]): an integer zero point keeps exact what a
// rounded minimum would not.  CODEBOOK4 (NF4, FP4) is w = scales[g] * codebook[code].
struct PackedLinear {
  WeightFormat format = WeightFormat::F32;
  int64_t n = 0, k = 0;
  int64_t group_size = 0;
  const void* data = nullptr;
  const void* scales = nullptr;  // f16, or f32 with wide_scales; packed beside data
  const void* mins = nullptr;    // likewise, or null: symmetric int8 (min 0) / int4 (min -8 * scale)
  bool wide_scales = false;
  bool zero_points = false;
  float codebook[16] = {};
};
inline bool has_groups(WeightFormat format) {
  return format != WeightFormat::F32 && format != WeightFormat::BF16;
}

enum class Norm : int32_t { NONE = 0, RMS = 1, LAYER = 2 };
enum class Activation : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4 };

struct NormSpec {
  Norm kind = Norm::NONE;
  float eps = 1e-5f;
  const float* weight = nullptr;  // [width]; null: ones.  (Gemma's 1 + w is folded in at load.)
  const float* bias = nullptr;    // [width] or null
};

// out = epilogue(norm(x) @ W^T + bias).  Buffers: x, out; with `residual`: out += instead of =.
// With `multiply`: out *= instead of =, so that a gate and an up projection can be two ops.
// Gated: W's rows alternate in blocks of 16, gate then up (pack_linear does it), and
// out[:, j] = activation(gate_j) * up_j has n / 2 columns.
struct LinearSpec {
  PackedLinear weight;
  NormSpec norm;                            // over the input row, before the permutation
  const int32_t* input_permutation = nullptr;  // [k]: column j of W reads x[input_permutation[j]]
  const float* input_scale = nullptr;       // [k]: multiplies the normed input (AWQ)
  bool int8_activations = false;            // quantize rows to int8 per group of `activation_group`
  bool bf16_activations = false;            // round rows, and a codebook, to bf16, as BF16 weights
                                            // always do; needs a weight of codes, not int8 rows
  int64_t activation_group = 0;             // 0: 32, or the weight's group where 32 does not divide it
  float outlier_threshold = 0;              // > 0: inputs of larger magnitude stay floats
                                            // (LLM.int8()); needs int8_activations, INT8
  const float* bias = nullptr;              // [n]
  Activation activation = Activation::NONE;
  bool gated = false;
  bool residual = false;
  bool multiply = false;
  bool logit_rows = false;                  // input rows are gathered by batch.logit_rows and
                                            // out has num_logit_rows rows
  float softcap = 0;                        // > 0: out = softcap * tanh(out / softcap)
  float output_scale = 1;                   // multiplies before bias and softcap
};
PLL_API pll_op make_linear(const LinearSpec& spec);

// out[t] = norm(x[t]); with `residual`: out[t] += norm(x[t]).  Buffers: x, out (may be one).
struct NormOpSpec {
  NormSpec norm;
  int64_t width = 0;
  bool residual = false;
};
PLL_API pll_op make_norm(const NormOpSpec& spec);

// out[t] = scale * table[token_ids[t]] (+ positions_table[positions[t] + position_offset]).
// Buffers: out.  The table is a PackedLinear [vocab, hidden], so a tied head needs no copy.
struct EmbedSpec {
  PackedLinear table;
  float scale = 1;
  const float* position_table = nullptr;  // [rows, hidden]
  int64_t num_positions = 0;
  int64_t position_offset = 0;
};
PLL_API pll_op make_embed(const EmbedSpec& spec);

// KV storage of the built-in caches.  block_size is a multiple of 16.
// F32, BF16: K [num_blocks, num_kv_heads, head_dim, block_size] (keys transposed: 16 keys to a
// vector); V [num_blocks, num_kv_heads, block_size, head_dim].
// I8: codes with a scale per token and head, value = scale * code, code in [-127, 127] (symmetric,
// scale = largest magnitude / 127; NaN where a value is not finite).  Four dimensions of a key, and
// four tokens of a value's column, stand side by side for products of bytes:
// K [num_blocks, num_kv_heads, ceil(head_dim / 4), block_size, 4], V [num_blocks, num_kv_heads,
// block_size / 4, head_dim, 4], and f32 scales [num_blocks, num_kv_heads, 2, block_size]: of keys,
// of values.
struct KVLayout {
  pll_dtype dtype = PLL_F32;  // F32, BF16 or I8
  int32_t num_blocks = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_size = 0;
};

// Optional per-head q/k RMS norm, then rotary (half-split pairs i, i + rotary_dim/2, as in
// GPT-NeoX) on q and k in place, then k and v into the cache at slot_mapping.
// Buffers: qkv [tokens, (num_heads + 2 num_kv_heads) * head_dim], k_cache, v_cache; with I8 the
// scales as well.
struct RotaryStoreSpec {
  int32_t num_heads = 0;
  KVLayout kv;
  int32_t kv_group = 0;
  int32_t rotary_dim = 0;            // 0: no rotary
  const float* cos = nullptr;        // [num_positions, rotary_dim / 2]
  const float* sin = nullptr;
  int64_t num_positions = 0;
  const float* q_norm = nullptr;     // [head_dim] or null
  const float* k_norm = nullptr;
  float qk_norm_eps = 1e-6f;
};
PLL_API pll_op make_rotary_store(const RotaryStoreSpec& spec);

// Causal attention of every token to its sequence's cached keys, online softmax (Milakov &
// Gimelshein 2018; Dao 2023), tiles at absolute positions so that a row's bits depend on
// neither chunking nor neighbours.  Buffers: qkv (q in its first num_heads * head_dim
// columns), out [tokens, num_heads * head_dim], k_cache, v_cache; with I8 the scales as well.
struct AttentionSpec {
  int32_t num_heads = 0;
  KVLayout kv;
  int32_t kv_group = 0;
  float scale = 1;
  int32_t window = 0;                // > 0: a token sees itself and the window-1 tokens before
  float softcap = 0;                 // > 0: scores = softcap * tanh(scores / softcap)
  const float* alibi_slopes = nullptr;  // [num_heads]: adds slope * (key position - query position)
  // Attention sinks (StreamingLLM, Xiao et al. 2023): with a window, a token also sees the first
  // `sinks` (at most 256), as if the window stood right behind them: positions are those within the
  // cache.  The keys in the window keep their distance, so only the query is turned back, when it
  // meets the sinks, by what lies between; the tables are RotaryStoreSpec's.
  int32_t sinks = 0;
  int32_t rotary_dim = 0;            // 0: keys are not rotated
  const float* cos = nullptr;        // [num_positions, rotary_dim / 2]
  const float* sin = nullptr;
  int64_t num_positions = 0;
};
PLL_API pll_op make_attention(const AttentionSpec& spec);

// Samples every logit row as batch.sampler says.  Buffers: logits [logit rows, vocab].
PLL_API pll_op make_sample(int64_t vocab_size);

// Copies blocks src -> dst of a group in the order given, all layers' tensors as buffers, each
// [num_blocks, block_bytes] whatever its dtype.  With `swaps` as many buffers follow, the swap space
// of each, whose blocks are counted on from the pool's: num_blocks is the first one there.
PLL_API pll_op make_copy_blocks(int32_t kv_group, bool swaps = false);

}  // namespace pyllmlite

#endif

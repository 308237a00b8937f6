// The ops of this package; see module.cpp for how Python gets them.
#ifndef CPP_EXAMPLE_OPS_H
#define CPP_EXAMPLE_OPS_H

#include <vector>

#include "pyllmlite/op.h"

struct AttentionParams {
  int num_heads, num_kv_heads, head_dim, block_size;
  int kv_group;
  int window;     // 0: none
  float scale;
  float softcap;  // 0: none
  std::vector<float> alibi_slopes;  // empty: none
};

// Buffers: qkv, out, k_cache, v_cache (f32, layout "paged-kt").
pll_op make_attention(AttentionParams params);

// Buffers: x, out; both f32 of the same width.
pll_op make_copy();

#endif

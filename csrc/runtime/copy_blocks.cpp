// Whole KV blocks, copied before a step's first op reads them: copy-on-write within the pool, and
// the way between the pool and a swap space.

#include <cstdio>
#include <cstring>

#include "pyllmlite/ops.h"

namespace pyllmlite {
namespace {

size_t dtype_size(int32_t dtype) {
  switch (dtype) {
    case PLL_I8:
    case PLL_U8:
      return 1;
    case PLL_BF16:
    case PLL_F16:
      return 2;
    case PLL_I64:
      return 8;
    default:
      return 4;
  }
}

struct CopyState {
  int32_t kv_group;
  bool swaps;  // the second half of the buffers are the first half's swap space
};

int64_t block_bytes(const pll_tensor& tensor) {
  return tensor.stride[0] * static_cast<int64_t>(dtype_size(tensor.dtype));
}

// Block numbers count on from the pool into its swap space.
char* block_at(const pll_tensor& pool, const pll_tensor* swap, int64_t block, int64_t bytes) {
  if (block < 0) return nullptr;
  if (block < pool.shape[0]) return static_cast<char*>(pool.data) + block * bytes;
  block -= pool.shape[0];
  if (swap == nullptr || block >= swap->shape[0]) return nullptr;
  return static_cast<char*>(swap->data) + block * bytes;
}

int plan_copies(void* state, const pll_batch* batch, char* error, size_t error_size) {
  const int32_t group = static_cast<CopyState*>(state)->kv_group;
  if (group >= batch->num_kv_groups) {
    snprintf(error, error_size, "copy_blocks: KV group %d, but the batch has %d", group,
             batch->num_kv_groups);
    return 1;
  }
  return 0;
}

int check_copies(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t, int32_t,
                 char* error, size_t error_size) {
  for (int32_t b = 0; b < num_buffers; ++b) {
    if (buffers[b].ndim > 0) continue;
    snprintf(error, error_size, "buffer %d has no blocks to copy, it is a scalar", b);
    return 1;
  }
  if (!static_cast<CopyState*>(state)->swaps) return 0;
  const int32_t pools = num_buffers / 2;
  if (num_buffers % 2 != 0) {
    snprintf(error, error_size, "copy_blocks: every buffer needs its swap space");
    return 1;
  }
  for (int32_t b = 0; b < pools; ++b) {
    if (block_bytes(buffers[b]) == block_bytes(buffers[pools + b])) continue;
    snprintf(error, error_size, "copy_blocks: blocks of buffer %d have %lld bytes, in its swap space %lld",
             b, block_bytes(buffers[b]) + 0LL, block_bytes(buffers[pools + b]) + 0LL);
    return 1;
  }
  return 0;
}

void run_copies(void* state, const pll_batch* batch, const pll_tensor* buffers,
                int32_t num_buffers, const pll_context* ctx) {
  const CopyState& s = *static_cast<CopyState*>(state);
  const pll_kv_group& group = batch->kv_groups[s.kv_group];
  const int32_t pools = s.swaps ? num_buffers / 2 : num_buffers;
  for (int32_t b = 0; b < pools; ++b) {
    const pll_tensor& pool = buffers[b];
    const pll_tensor* swap = s.swaps ? &buffers[pools + b] : nullptr;
    const int64_t bytes = block_bytes(pool);
    // A thread owns a range of bytes of every block, so that copies which follow one another
    // (a -> b, b -> c) keep their order.  Ranges begin on cache lines.
    const int64_t lines = (bytes + 63) / 64;
    const int64_t begin = lines * ctx->thread / ctx->num_threads * 64;
    int64_t end = lines * (ctx->thread + 1) / ctx->num_threads * 64;
    if (end > bytes) end = bytes;
    if (begin >= end) continue;
    for (int32_t i = 0; i < group.num_copies; ++i) {
      const char* source = block_at(pool, swap, group.copies[2 * i], bytes);
      char* target = block_at(pool, swap, group.copies[2 * i + 1], bytes);
      if (source == nullptr || target == nullptr) {
        ctx->fail(ctx, "copy_blocks: a block lies outside of the cache");
        return;
      }
      if (source != target) memcpy(target + begin, source + begin, end - begin);
    }
  }
}

void destroy_copies(void* state) { delete static_cast<CopyState*>(state); }

}  // namespace

pll_op make_copy_blocks(int32_t kv_group, bool swaps) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "copy_blocks";
  op.state = new CopyState{kv_group, swaps};
  op.plan = plan_copies;
  op.run = run_copies;
  op.check = check_copies;
  op.destroy = destroy_copies;
  return op;
}

}  // namespace pyllmlite

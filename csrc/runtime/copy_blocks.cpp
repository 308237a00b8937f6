// Copy-on-write: whole KV blocks, copied before a step's first op reads them.

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
};

int plan_copies(void* state, const pll_batch* batch, char* error, size_t error_size) {
  const int32_t group = static_cast<CopyState*>(state)->kv_group;
  if (group >= batch->num_kv_groups) {
    snprintf(error, error_size, "copy_blocks: KV group %d, but the batch has %d", group,
             batch->num_kv_groups);
    return 1;
  }
  return 0;
}

int check_copies(void*, const pll_tensor* buffers, int32_t num_buffers, int32_t, int32_t,
                 char* error, size_t error_size) {
  for (int32_t b = 0; b < num_buffers; ++b) {
    if (buffers[b].ndim > 0) continue;
    snprintf(error, error_size, "buffer %d has no blocks to copy, it is a scalar", b);
    return 1;
  }
  return 0;
}

void run_copies(void* state, const pll_batch* batch, const pll_tensor* buffers,
                int32_t num_buffers, const pll_context* ctx) {
  const pll_kv_group& group = batch->kv_groups[static_cast<CopyState*>(state)->kv_group];
  for (int32_t b = 0; b < num_buffers; ++b) {
    const pll_tensor& tensor = buffers[b];
    const int64_t bytes = tensor.stride[0] * static_cast<int64_t>(dtype_size(tensor.dtype));
    // A thread owns a range of bytes of every block, so that copies which follow one another
    // (a -> b, b -> c) keep their order.  Ranges begin on cache lines.
    const int64_t lines = (bytes + 63) / 64;
    const int64_t begin = lines * ctx->thread / ctx->num_threads * 64;
    int64_t end = lines * (ctx->thread + 1) / ctx->num_threads * 64;
    if (end > bytes) end = bytes;
    if (begin >= end) continue;
    for (int32_t i = 0; i < group.num_copies; ++i) {
      const int64_t source = group.copies[2 * i], target = group.copies[2 * i + 1];
      if (source < 0 || target < 0 || source >= tensor.shape[0] || target >= tensor.shape[0]) {
        ctx->fail(ctx, "copy_blocks: a block lies outside of the cache");
        return;
      }
      if (source == target) continue;
      char* base = static_cast<char*>(tensor.data);
      memcpy(base + target * bytes + begin, base + source * bytes + begin, end - begin);
    }
  }
}

void destroy_copies(void* state) { delete static_cast<CopyState*>(state); }

}  // namespace

pll_op make_copy_blocks(int32_t kv_group) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "copy_blocks";
  op.state = new CopyState{kv_group};
  op.plan = plan_copies;
  op.run = run_copies;
  op.check = check_copies;
  op.destroy = destroy_copies;
  return op;
}

}  // namespace pyllmlite

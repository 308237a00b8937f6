// out = x: the least that an op can do, to measure what being a plugin costs (measure.py).
#include <cstring>

#include "ops.h"

pll_op make_copy() {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(op);
  op.name = "cpp_example_copy";
  op.run = [](void*, const pll_batch* batch, const pll_tensor* buffers, int32_t,
              const pll_context* ctx) {
    const int64_t width = buffers[0].shape[1];
    for (int32_t t = ctx->thread; t < batch->num_tokens; t += ctx->num_threads) {
      std::memcpy(static_cast<float*>(buffers[1].data) + t * buffers[1].stride[0],
                  static_cast<const float*>(buffers[0].data) + t * buffers[0].stride[0],
                  sizeof(float) * width);
    }
  };
  return op;
}

// RMS norm and LayerNorm over rows, and their residual form.

#include <math.h>

#include "factories.h"

namespace pyllmlite::PLL_NS {
namespace {

struct NormState {
  NormOpSpec spec;
};

void norm_row(const NormOpSpec& spec, const float* x, float* out) {
  const int64_t n = spec.width;
  float mean = 0, factor = 1;
  if (spec.norm.kind == Norm::LAYER) {
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= n;
  }
  if (spec.norm.kind != Norm::NONE) {
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += (x[i] - mean) * (x[i] - mean);
    factor = 1.0f / sqrtf(sum / n + spec.norm.eps);
  }
  for (int64_t i = 0; i < n; ++i) {
    float y = (x[i] - mean) * factor;
    if (spec.norm.weight) y *= spec.norm.weight[i];
    if (spec.norm.bias) y += spec.norm.bias[i];
    out[i] = spec.residual ? out[i] + y : y;
  }
}

void run_norm(void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
              const pll_context* ctx) {
  const NormOpSpec& spec = static_cast<NormState*>(state)->spec;
  const pll_tensor& x = buffers[0];
  const pll_tensor& out = buffers[1];
  for (int32_t t = ctx->thread; t < batch->num_tokens; t += ctx->num_threads) {
    norm_row(spec, static_cast<const float*>(x.data) + t * x.stride[0],
             static_cast<float*>(out.data) + t * out.stride[0]);
  }
}

void destroy_norm(void* state) { delete static_cast<NormState*>(state); }

}  // namespace

pll_op make_norm(const NormOpSpec& spec) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(pll_op);
  op.name = "norm";
  op.state = new NormState{spec};
  op.run = run_norm;
  op.destroy = destroy_norm;
  return op;
}

}  // namespace pyllmlite::PLL_NS

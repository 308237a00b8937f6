// RMS norm and LayerNorm over rows, and their residual form.

#include <math.h>

#include "cpu/buffers.h"
#include "cpu/factories.h"
#include "cpu/simd.h"

namespace pyllmlite::PLL_NS {
namespace {

struct NormState {
  NormOpSpec spec;
};

// Sums run over four vectors in turn, then the rest, then (0 + 1) + (2 + 3), then the lanes: one
// order for a width, whatever row or thread.  f(x, n) has n lanes that count, the others x = 0.
template <typename F>
PLL_INLINE float sum_over(const float* x, int64_t width, const F& f) {
  vf sums[4] = {vzero(), vzero(), vzero(), vzero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
    for (int j = 0; j < 4; ++j) sums[j] = f(vload(x + i + 16 * j), sums[j]);
  }
  for (; i + 16 <= width; i += 16) sums[0] = f(vload(x + i), sums[0]);
  if (i < width) {
    // The lanes past the end keep their sum, which f(0) might not.
    float before[16], after[16];
    vstore(before, sums[0]);
    vstore(after, f(vload_n(x + i, width - i), sums[0]));
    memcpy(before, after, sizeof(float) * (width - i));
    sums[0] = vload(before);
  }
  return vreduce_add(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
}

// y = (x - mean) * factor * weight + bias for n lanes; a residual is added to what stands in out.
template <bool FULL>
PLL_INLINE void norm_lanes(const NormOpSpec& spec, const float* x, float* out, int64_t i,
                           int64_t n, vf mean, vf factor) {
  auto load = [n](const float* p) { return FULL ? vload(p) : vload_n(p, n); };
  vf y = vmul(vsub(load(x + i), mean), factor);
  if (spec.norm.weight) y = vmul(y, load(spec.norm.weight + i));
  if (spec.norm.bias) y = vadd(y, load(spec.norm.bias + i));
  if (spec.residual) y = vadd(load(out + i), y);
  if (FULL) {
    vstore(out + i, y);
  } else {
    vstore_n(out + i, y, n);
  }
}

void norm_row(const NormOpSpec& spec, const float* x, float* out) {
  const int64_t width = spec.width;
  float mean = 0, factor = 1;
  if (spec.norm.kind == Norm::LAYER) {
    mean = sum_over(x, width, [](vf v, vf sum) { return vadd(sum, v); }) /
           static_cast<float>(width);
  }
  if (spec.norm.kind == Norm::LAYER || spec.norm.kind == Norm::RMS) {
    // Around the mean in a second pass: E[x^2] - mean^2 would cancel.
    const vf center = vset1(mean);
    const float squares = sum_over(x, width, [center](vf v, vf sum) {
      const vf d = vsub(v, center);
      return vfma(d, d, sum);
    });
    factor = 1.0f / sqrtf(squares / static_cast<float>(width) + spec.norm.eps);
  }
  const vf vmean = vset1(mean), vfactor = vset1(factor);
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) norm_lanes<true>(spec, x, out, i, 16, vmean, vfactor);
  if (i < width) norm_lanes<false>(spec, x, out, i, width - i, vmean, vfactor);
}

int check_norm(void* state, const pll_tensor* buffers, int32_t num_buffers, int32_t max_num_tokens,
               int32_t, char* error, size_t error_size) {
  const int64_t width = static_cast<NormState*>(state)->spec.width;
  const BufferNeed needs[] = {
      {"x", PLL_F32, max_num_tokens, width},
      {"out", PLL_F32, max_num_tokens, width},
  };
  return check_buffers(needs, 2, buffers, num_buffers, error, error_size);
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
  op.check = check_norm;
  op.destroy = destroy_norm;
  return op;
}

}  // namespace pyllmlite::PLL_NS

// Phase 1 of the linear op: one input row, normed, scaled, permuted and converted.

#include "linear_impl.h"
#include "simd_int.h"

namespace pyllmlite::PLL_NS {
namespace {

// Sum of f(x[i]) over [0, n): four vectors in flight, added in a fixed order.
template <class F>
float sum_of(const float* x, int64_t n, F f) {
  vf s0 = vzero(), s1 = vzero(), s2 = vzero(), s3 = vzero();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    s0 = f(s0, vload(x + i));
    s1 = f(s1, vload(x + i + 16));
    s2 = f(s2, vload(x + i + 32));
    s3 = f(s3, vload(x + i + 48));
  }
  for (; i + 16 <= n; i += 16) s0 = f(s0, vload(x + i));
  float tail[16];
  if (i < n) {
    // Lanes past the end must add f(nothing) = 0, whatever f does to a zero.
    vstore(tail, f(vzero(), vload_n(x + i, n - i)));
    s1 = vadd(s1, vload_n(tail, n - i));
  }
  return vreduce_add(vadd(vadd(s0, s1), vadd(s2, s3)));
}

float plain_sum(const float* x, int64_t n) {
  return sum_of(x, n, [](vf s, vf v) { return vadd(s, v); });
}

// y = norm(x) * input_scale over the row; y has room up to the next multiple of 16.
void norm_row(const LinearSpec& spec, const float* x, int64_t k, float* y) {
  float mean = 0, factor = 1;
  if (spec.norm.kind == Norm::LAYER) {
    mean = plain_sum(x, k) / (float)k;
    const vf m = vset1(mean);
    const float squares = sum_of(x, k, [m](vf s, vf v) {
      const vf d = vsub(v, m);
      return vfma(d, d, s);
    });
    factor = 1.0f / __builtin_sqrtf(squares / (float)k + spec.norm.eps);
  } else if (spec.norm.kind == Norm::RMS) {
    const float squares = sum_of(x, k, [](vf s, vf v) { return vfma(v, v, s); });
    factor = 1.0f / __builtin_sqrtf(squares / (float)k + spec.norm.eps);
  }
  const float* weight = spec.norm.kind == Norm::NONE ? nullptr : spec.norm.weight;
  const float* bias = spec.norm.kind == Norm::NONE ? nullptr : spec.norm.bias;
  const vf m = vset1(mean), f = vset1(factor);
  for (int64_t i = 0; i < k; i += 16) {
    const int64_t n = k - i;
    vf v = vload_n(x + i, n);
    if (spec.norm.kind == Norm::LAYER) v = vsub(v, m);
    if (spec.norm.kind != Norm::NONE) v = vmul(v, f);
    if (weight) v = vmul(v, vload_n(weight + i, n));
    if (bias) v = vadd(v, vload_n(bias + i, n));
    if (spec.input_scale) v = vmul(v, vload_n(spec.input_scale + i, n));
    vstore(y + i, v);
  }
}

// Symmetric, round to nearest even, scale = max |y| / 127.  A group that holds NaN or infinity
// gets codes 0 and scale NaN: its row's outputs are NaN, other rows see nothing.
void quantize(const RowLayout& row, const float* y, uint8_t* record) {
  int8_t* codes = reinterpret_cast<int8_t*>(record);
  float* scales = reinterpret_cast<float*>(record + row.scale_at);
  int32_t* code_sums = reinterpret_cast<int32_t*>(record + row.code_sum_at);
  float* sums = reinterpret_cast<float*>(record + row.sum_at);
  for (int64_t s = 0; s < row.num_segments; s += row.segments_per_activation_group) {
    int64_t s_end = s + row.segments_per_activation_group;
    if (s_end > row.num_segments) s_end = row.num_segments;
    const int64_t begin = s * row.segment;
    const int64_t end = s_end * row.segment < row.k ? s_end * row.segment : row.k;
    vf top = vzero(), spoilt = vzero();
    for (int64_t i = begin; i < end; i += 16) {
      const vf v = vload_n(y + i, end - i);
      top = vmax(vabs(v), top);
      spoilt = vfma(v, vzero(), spoilt);  // 0, or NaN where v is not finite
    }
    const bool finite = vreduce_add(spoilt) == 0.0f;
    const float amax = finite ? vreduce_max(top) : 0.0f;
    // Below 1e-35 127 / amax nears overflow; such a group is nothing beside any other number.
    const float inverse = amax > 1e-35f ? 127.0f / amax : 0.0f;
    const float scale = !finite ? __builtin_nanf("") : amax > 1e-35f ? amax / 127.0f : 0.0f;
    const vf inv = vset1(inverse);
    if (finite) {
      for (int64_t i = begin; i < end; i += 16) {
        vstore_i8(codes + i, vround(vmul(vload_n(y + i, end - i), inv)));
      }
    } else {
      memset(codes + begin, 0, static_cast<size_t>(end - begin));
    }
    for (int64_t j = s; j < s_end; ++j) {
      const int64_t to = (j + 1) * row.segment < row.k ? (j + 1) * row.segment : row.k;
      int32_t total = 0;
      for (int64_t i = j * row.segment; i < to; ++i) total += codes[i];
      scales[j] = scale;
      code_sums[j] = total;
      sums[j] = scale * (float)total;
    }
  }
  memset(codes + row.k, 0, 16);
}

}  // namespace

void prepare_row(const LinearState& state, const float* x, float* temp, uint8_t* record) {
  const LinearSpec& spec = state.spec;
  const RowLayout& row = state.row;
  const int64_t k = row.k;
  const int32_t* permutation = spec.input_permutation;
  float* const y = row.type == RowType::F32 ? reinterpret_cast<float*>(record) : temp;
  if (permutation) {
    float* const plain = temp + (k + 31) / 16 * 16;
    norm_row(spec, x, k, plain);
    for (int64_t i = 0; i < k; ++i) y[i] = plain[permutation[i]];
  } else {
    norm_row(spec, x, k, y);
  }
  memset(y + k, 0, 16 * sizeof(float));

  switch (row.type) {
    case RowType::F32: {
      float* sums = reinterpret_cast<float*>(record + row.sum_at);
      for (int64_t s = 0; s < row.num_segments; ++s) {
        const int64_t begin = s * row.segment;
        const int64_t n = begin + row.segment < k ? row.segment : k - begin;
        sums[s] = plain_sum(y + begin, n);
      }
      break;
    }
    case RowType::BF16: {
#if PLL_ISA >= PLL_ISA_AVX512_BF16
      uint16_t* to = reinterpret_cast<uint16_t*>(record);
      for (int64_t i = 0; i < k; i += 16) vstore_bf16(to + i, vload(y + i));
      memset(to + k, 0, 16 * sizeof(uint16_t));
#else
      float* to = reinterpret_cast<float*>(record);
      for (int64_t i = 0; i < k; i += 16) {
        uint16_t rounded[16];
        vstore_bf16(rounded, vload(y + i));
        vstore(to + i, vload_bf16(rounded));
      }
      memset(to + k, 0, 16 * sizeof(float));
#endif
      break;
    }
    case RowType::INT8:
      quantize(row, y, record);
      break;
  }
}

}  // namespace pyllmlite::PLL_NS

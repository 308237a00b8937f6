// Phase 1 of the linear op: one input row, normed, scaled, permuted and converted.

#include <math.h>

#include "linear_impl.h"
#include "linear_outliers.h"
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

// What a row's values are normed with.
struct NormedBy {
  vf mean, factor;
  const float* weight;
  const float* bias;
  const float* input_scale;
  Norm kind;
};

NormedBy norm_of(const LinearSpec& spec, const float* x, int64_t k) {
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
  const bool none = spec.norm.kind == Norm::NONE;
  return NormedBy{vset1(mean), vset1(factor), none ? nullptr : spec.norm.weight,
                  none ? nullptr : spec.norm.bias, spec.input_scale, spec.norm.kind};
}

// norm(x) * input_scale of v, which holds x[i] to x[i + n).
PLL_INLINE vf normed(const NormedBy& by, vf v, int64_t i, int64_t n) {
  if (by.kind == Norm::LAYER) v = vsub(v, by.mean);
  if (by.kind != Norm::NONE) v = vmul(v, by.factor);
  if (by.weight) v = vmul(v, vload_n(by.weight + i, n));
  if (by.bias) v = vadd(v, vload_n(by.bias + i, n));
  if (by.input_scale) v = vmul(v, vload_n(by.input_scale + i, n));
  return v;
}

// y = norm(x) * input_scale over the row; y has room up to the next multiple of 16.
void norm_row(const LinearSpec& spec, const float* x, int64_t k, float* y) {
  const NormedBy by = norm_of(spec, x, k);
  for (int64_t i = 0; i < k; i += 16) vstore(y + i, normed(by, vload_n(x + i, k - i), i, k - i));
}

int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// max |y| of every activation group into amax; infinity or NaN where a group holds either.
void find_amax(const RowLayout& row, const float* y, float* amax) {
  const int64_t columns = row.segment * row.segments_per_activation_group;
  for (int64_t begin = 0; begin < row.k; begin += columns) {
    const int64_t end = at_most(begin + columns, row.k);
    vi top = vi_set1(0);
    for (int64_t i = begin; i < end; i += 16) {
      top = vi_max(top, vi_abs_bits(vload_n(y + i, end - i)));
    }
    const int32_t bits = vi_reduce_max(top);
    memcpy(amax++, &bits, 4);
  }
}

// Codes of columns [begin, end) as y * inverse rounded; their sum.
int32_t write_codes(const float* y, int64_t begin, int64_t end, float inverse, int8_t* codes) {
  const vf factor = vset1(inverse);
  vi sum = vi_set1(0);
  for (int64_t i = begin; i < end; i += 16) {
    const vi code = vi_round(vmul(vload_n(y + i, end - i), factor));
    vi_store_i8(codes + i, code);
    sum = vi_add(sum, code);
  }
  return vi_reduce_add(sum);
}

// Symmetric, round to nearest even, scale = max |y| / 127.  A group that holds NaN or infinity
// gets codes 0 and scale NaN: its row's outputs are NaN, other rows see nothing.
struct GroupScale {
  float scale, inverse;
};
PLL_INLINE GroupScale scale_of(float amax) {
  const bool finite = amax < INFINITY;
  // Below 1e-35 127 / amax nears overflow; such a group is nothing beside any other number.
  const bool tiny = amax <= 1e-35f;
  return GroupScale{!finite ? NAN : tiny ? 0.0f : amax / 127.0f,
                    finite && !tiny ? 127.0f / amax : 0.0f};
}

// Where a record's parts stand, INT8 rows.
struct Record {
  int8_t* codes;
  float* scales;
  int32_t* starts;
  float* sums;

  Record(const RowLayout& row, uint8_t* record)
      : codes(reinterpret_cast<int8_t*>(record)),
        scales(reinterpret_cast<float*>(record + row.scale_at)),
        starts(reinterpret_cast<int32_t*>(record + row.start_at)),
        sums(reinterpret_cast<float*>(record + row.sum_at)) {}

  inline __attribute__((always_inline)) void set_segment(const RowLayout& row, int64_t s, float scale, int32_t total) const {
    scales[s] = scale;
    starts[s] = -row.raised * total;
    sums[s] = scale * static_cast<float>(total);
  }
};

// temp: 2 floats an activation group.
void quantize(const RowLayout& row, const float* y, float* temp, uint8_t* record) {
  const Record to(row, record);
  const int64_t per_group = row.segments_per_activation_group;
  const int64_t groups = (row.num_segments + per_group - 1) / per_group;
  float* amax = temp;
  float* inverses = temp + groups;
  find_amax(row, y, amax);
  for (int64_t g = 0; g < groups; ++g) {
    const GroupScale scale = scale_of(amax[g]);
    amax[g] = scale.scale;
    inverses[g] = scale.inverse;
  }
  for (int64_t s = 0, g = 0; s < row.num_segments; ++g) {
    const float scale = amax[g];
    for (const int64_t last = at_most(s + per_group, row.num_segments); s < last; ++s) {
      const int64_t begin = s * row.segment, end = at_most(begin + row.segment, row.k);
      int32_t total = 0;
      if (scale == scale) {
        total = write_codes(y, begin, end, inverses[g], to.codes);
      } else {
        memset(to.codes + begin, 0, static_cast<size_t>(end - begin));
      }
      to.set_segment(row, s, scale, total);
    }
  }
  memset(to.codes + row.k, 0, 16);
}

// The same for a row of whole segments of VECTORS vectors, each an activation group: normed and
// quantized while it is in registers.
template <int VECTORS>
void norm_and_quantize(const LinearSpec& spec, const RowLayout& row, const float* x,
                       uint8_t* record) {
  const Record to(row, record);
  const NormedBy by = norm_of(spec, x, row.k);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const int64_t begin = s * VECTORS * 16;
    vf y[VECTORS];
    vi top = vi_set1(0);
    PLL_UNROLL for (int i = 0; i < VECTORS; ++i) {
      const int64_t at = begin + i * 16;
      y[i] = normed(by, vload(x + at), at, 16);
      top = vi_max(top, vi_abs_bits(y[i]));
    }
    const int32_t bits = vi_reduce_max(top);
    float amax;
    memcpy(&amax, &bits, 4);
    const GroupScale scale = scale_of(amax);
    const vf inverse = vset1(scale.inverse);
    // Not finite: 0 times it would be a NaN.
    const bool finite = scale.scale == scale.scale;
    vi sum = vi_set1(0);
    PLL_UNROLL for (int i = 0; i < VECTORS; ++i) {
      const vi code = finite ? vi_round(vmul(y[i], inverse)) : vi_set1(0);
      vi_store_i8(to.codes + begin + i * 16, code);
      sum = vi_add(sum, code);
    }
    to.set_segment(row, s, scale.scale, vi_reduce_add(sum));
  }
  memset(to.codes + row.k, 0, 16);
}

void write_sums(const RowLayout& row, const float* values, uint8_t* record) {
  float* sums = reinterpret_cast<float*>(record + row.sum_at);
  for (int64_t s = 0; s < row.num_segments; ++s) {
    const int64_t begin = s * row.segment;
    sums[s] = plain_sum(values + begin, at_most(row.segment, row.k - begin));
  }
}

// y, which has zeros up to y[k + 16], rounded to bf16, with the sums of what it became.
void write_bf16(const RowLayout& row, float* y, uint8_t* record) {
#if PLL_ISA >= PLL_ISA_AVX512_BF16
  uint16_t* to = reinterpret_cast<uint16_t*>(record);
  for (int64_t i = 0; i < row.k; i += 16) vstore_bf16(to + i, vload(y + i));
  memset(to + row.k, 0, 16 * sizeof(uint16_t));
  if (row.num_segments == 0) return;
  for (int64_t i = 0; i < row.k; i += 16) {
    vstore(y + i, vload_bf16(to + i));
    // Columns 0 2 1 3 of every four, the order in which linear_bf16_rows.cpp pairs codes.
    constexpr int ORDER = 0 | 2 << 2 | 1 << 4 | 3 << 6;
    const __m256i plain = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to + i));
    const __m256i paired =
        _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(plain, ORDER), ORDER);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), paired);
  }
#else
  for (int64_t i = 0; i < row.k; i += 16) {
    uint16_t rounded[16];
    vstore_bf16(rounded, vload(y + i));
    vstore(y + i, vload_bf16(rounded));
  }
  memcpy(record, y, static_cast<size_t>(row.k + 16) * sizeof(float));
#endif
  write_sums(row, y, record);
}

}  // namespace

void prepare_row(const LinearState& state, const float* x, float* temp, uint8_t* record) {
  const LinearSpec& spec = state.spec;
  const RowLayout& row = state.row;
  const int64_t k = row.k;
  const int32_t* permutation = spec.input_permutation;
  if (row.type == RowType::INT8 && !permutation && row.outliers_at == 0 &&
      row.segments_per_activation_group == 1 && k % row.segment == 0) {
    if (row.segment == 32) return norm_and_quantize<2>(spec, row, x, record);
    if (row.segment == 64) return norm_and_quantize<4>(spec, row, x, record);
    if (row.segment == 128) return norm_and_quantize<8>(spec, row, x, record);
  }
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
    case RowType::F32:
      write_sums(row, y, record);
      break;
    case RowType::BF16:
      write_bf16(row, y, record);
      break;
    case RowType::INT8:
      if (row.outliers_at != 0) take_outliers(state, y, record);
      quantize(row, y, temp + (k + 31) / 16 * 16, record);
      break;
  }
}

}  // namespace pyllmlite::PLL_NS

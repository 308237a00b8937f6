// A vector of 16 floats, `vf`, for whichever instruction set PLL_ISA names.
//
// AVX-512: one zmm; AVX2: two ymm; scalar: compiler vectors of four, which build on any machine.
// Everything is static inline inside PLL_NS, so that no copy
// built for a newer machine can be linked into an older one's path (see factories.h).
//
// Order of reductions and of elementwise operations is the same for all sets.  vfma rounds once
// where the machine has a fused multiply-add (AVX2, AVX-512, AArch64, scalar with -mfma) and
// twice, as a product and a sum, elsewhere.
#ifndef PYLLMLITE_CPU_SIMD_H
#define PYLLMLITE_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "factories.h"

#if !defined(PLL_NS) || !defined(PLL_ISA)
#error "PLL_NS and PLL_ISA must be defined (see cpu/factories.h)"
#endif

#if PLL_ISA > PLL_ISA_SCALAR
// GCC 12 warns of its own _mm512_undefined_ps (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyllmlite::PLL_NS {

// Under AddressSanitizer every inlined temporary gets a guarded place in the frame, and forced
// inlining makes the compiler take minutes over a kernel.
#if defined(__SANITIZE_ADDRESS__)
#define PLL_INLINE static inline __attribute__((unused))
#else
#define PLL_INLINE static inline __attribute__((always_inline, unused))
#endif

// --- scalar conversions --------------------------------------------------------------------

PLL_INLINE float bits_to_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

PLL_INLINE uint32_t f32_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

PLL_INLINE float bf16_to_f32(uint16_t h) { return bits_to_f32((uint32_t)h << 16); }

// Round to nearest even; NaN stays a (quiet) NaN.
PLL_INLINE uint16_t f32_to_bf16(float f) {
  uint32_t u = f32_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

PLL_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_f32(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // The f16 exponent read as f32's is 112 too small; the product also normalizes subnormals.
  const float value = bits_to_f32(magnitude << 13) * 0x1p112f;
  return bits_to_f32(sign | f32_to_bits(value));
}

// Round to nearest even; overflow becomes infinity, NaN stays a (quiet) NaN.
PLL_INLINE uint16_t f32_to_f16(float f) {
  const uint32_t u = f32_to_bits(f);
  const uint16_t sign = (uint16_t)((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the mantissa
    const float shifted = bits_to_f32(magnitude) + 0.5f;
    return (uint16_t)(sign | (f32_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

// --- the vector ------------------------------------------------------------------------------

static constexpr int VF = 16;

#if PLL_ISA >= PLL_ISA_AVX512
struct vf {
  __m512 v;
};

PLL_INLINE __mmask16 mask_n(int64_t n) {
  return n >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1u);
}

PLL_INLINE vf vzero() { return {_mm512_setzero_ps()}; }
PLL_INLINE vf vset1(float x) { return {_mm512_set1_ps(x)}; }
PLL_INLINE vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
PLL_INLINE vf vload_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(mask_n(n), p)}; }
PLL_INLINE void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
PLL_INLINE void vstore_n(float* p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, mask_n(n), a.v); }
PLL_INLINE vf vadd(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
PLL_INLINE vf vsub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
PLL_INLINE vf vmul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
PLL_INLINE vf vdiv(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
PLL_INLINE vf vfma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PLL_INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
PLL_INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
PLL_INLINE vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
PLL_INLINE vf vsqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
PLL_INLINE vf vcopysign(vf magnitude, vf sign) {
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      _mm512_castps_si512(magnitude.v), _mm512_castps_si512(sign.v),
      _mm512_set1_epi32((int)0x80000000u), 0xd8))};
}
PLL_INLINE vf vselect_gt(vf a, vf b, vf x, vf y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
PLL_INLINE vf vround(vf a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// a * 2^n for integral n; rounds once where the result is subnormal.
PLL_INLINE vf vscale2(vf a, vf n) { return {_mm512_scalef_ps(a.v, n.v)}; }

PLL_INLINE vf vload_bf16(const uint16_t* p) {
  const __m512i u = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
}
PLL_INLINE vf vload_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
PLL_INLINE void vstore_bf16(uint16_t* p, vf a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i q = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(q, 16)));
}
PLL_INLINE __m256 vlow(vf a) { return _mm512_castps512_ps256(a.v); }
PLL_INLINE __m256 vhigh(vf a) { return _mm512_extractf32x8_ps(a.v, 1); }

#elif PLL_ISA >= PLL_ISA_AVX2
struct vf {
  __m256 lo, hi;
};

PLL_INLINE __m256i mask_n(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n > 8 ? 8 : n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

PLL_INLINE vf vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PLL_INLINE vf vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PLL_INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PLL_INLINE vf vload_n(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, mask_n(n)), _mm256_maskload_ps(p + 8, mask_n(n - 8))};
}
PLL_INLINE void vstore(float* p, vf a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
PLL_INLINE void vstore_n(float* p, vf a, int64_t n) {
  _mm256_maskstore_ps(p, mask_n(n), a.lo);
  _mm256_maskstore_ps(p + 8, mask_n(n - 8), a.hi);
}
PLL_INLINE vf vadd(vf a, vf b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
PLL_INLINE vf vsub(vf a, vf b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
PLL_INLINE vf vmul(vf a, vf b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
PLL_INLINE vf vdiv(vf a, vf b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
PLL_INLINE vf vfma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PLL_INLINE vf vmax(vf a, vf b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
PLL_INLINE vf vmin(vf a, vf b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
PLL_INLINE vf vabs(vf a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
PLL_INLINE vf vsqrt(vf a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
PLL_INLINE vf vcopysign(vf m, vf s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, m.lo), _mm256_and_ps(sign, s.lo)),
          _mm256_or_ps(_mm256_andnot_ps(sign, m.hi), _mm256_and_ps(sign, s.hi))};
}
PLL_INLINE vf vselect_gt(vf a, vf b, vf x, vf y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
PLL_INLINE vf vround(vf a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PLL_INLINE __m256 scale2_half(__m256 a, __m256 n) {
  // In two steps, so that neither factor leaves the normal range for |n| <= 252.
  const __m256i i = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(i, 1);
  const __m256i rest = _mm256_sub_epi32(i, half);
  const __m256i bias = _mm256_set1_epi32(127);
  a = _mm256_mul_ps(
      a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(
      a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
PLL_INLINE vf vscale2(vf a, vf n) { return {scale2_half(a.lo, n.lo), scale2_half(a.hi, n.hi)}; }

PLL_INLINE vf vload_bf16(const uint16_t* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
PLL_INLINE vf vload_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
PLL_INLINE __m256i bf16_bits_half(__m256 a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
}
PLL_INLINE void vstore_bf16(uint16_t* p, vf a) {
  const __m256i packed = _mm256_packus_epi32(bf16_bits_half(a.lo), bf16_bits_half(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
PLL_INLINE __m256 vlow(vf a) { return a.lo; }
PLL_INLINE __m256 vhigh(vf a) { return a.hi; }

#else
// Four vectors of four, in GCC's and Clang's vector extension: SSE2, NEON or whatever there is.
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));
typedef uint16_t h4 __attribute__((vector_size(8)));

struct vf {
  f4 v[4];
};

#define PLL_EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

PLL_INLINE f4 splat(float x) { return f4{x, x, x, x}; }
PLL_INLINE u4 splat_bits(uint32_t x) { return u4{x, x, x, x}; }
PLL_INLINE f4 pick(i4 mask, f4 x, f4 y) { return (f4)((mask & (i4)x) | (~mask & (i4)y)); }

PLL_INLINE vf vset1(float x) {
  vf r;
  PLL_EACH r.v[i] = splat(x);
  return r;
}
PLL_INLINE vf vzero() { return vset1(0.0f); }
PLL_INLINE vf vload(const float* p) {
  vf r;
  memcpy(&r, p, sizeof(r));
  return r;
}
PLL_INLINE vf vload_n(const float* p, int64_t n) {
  if (n >= 16) return vload(p);
  float tail[16] = {};
  for (int64_t i = 0; i < n; ++i) tail[i] = p[i];
  return vload(tail);
}
PLL_INLINE void vstore(float* p, vf a) { memcpy(p, &a, sizeof(a)); }
PLL_INLINE void vstore_n(float* p, vf a, int64_t n) {
  float all[16];
  vstore(all, a);
  for (int64_t i = 0; i < n && i < 16; ++i) p[i] = all[i];
}
PLL_INLINE vf vadd(vf a, vf b) {
  PLL_EACH a.v[i] = a.v[i] + b.v[i];
  return a;
}
PLL_INLINE vf vsub(vf a, vf b) {
  PLL_EACH a.v[i] = a.v[i] - b.v[i];
  return a;
}
PLL_INLINE vf vmul(vf a, vf b) {
  PLL_EACH a.v[i] = a.v[i] * b.v[i];
  return a;
}
PLL_INLINE vf vdiv(vf a, vf b) {
  PLL_EACH a.v[i] = a.v[i] / b.v[i];
  return a;
}
PLL_INLINE vf vfma(vf a, vf b, vf c) {
#if defined(__aarch64__)
  PLL_EACH c.v[i] = (f4)vfmaq_f32((float32x4_t)c.v[i], (float32x4_t)a.v[i], (float32x4_t)b.v[i]);
#elif defined(__FMA__)
  PLL_EACH for (int j = 0; j < 4; ++j) {
    c.v[i][j] = __builtin_fmaf(a.v[i][j], b.v[i][j], c.v[i][j]);
  }
#else
  PLL_EACH c.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return c;
}
PLL_INLINE vf vmax(vf a, vf b) {
  PLL_EACH a.v[i] = pick((i4)(a.v[i] > b.v[i]), a.v[i], b.v[i]);
  return a;
}
PLL_INLINE vf vmin(vf a, vf b) {
  PLL_EACH a.v[i] = pick((i4)(a.v[i] < b.v[i]), a.v[i], b.v[i]);
  return a;
}
PLL_INLINE vf vabs(vf a) {
  PLL_EACH a.v[i] = (f4)((u4)a.v[i] & splat_bits(0x7fffffffu));
  return a;
}
PLL_INLINE vf vsqrt(vf a) {
  PLL_EACH for (int j = 0; j < 4; ++j) a.v[i][j] = __builtin_sqrtf(a.v[i][j]);
  return a;
}
PLL_INLINE f4 copysign4(f4 magnitude, f4 sign) {
  const u4 bit = splat_bits(0x80000000u);
  return (f4)(((u4)magnitude & ~bit) | ((u4)sign & bit));
}
PLL_INLINE vf vcopysign(vf m, vf s) {
  PLL_EACH m.v[i] = copysign4(m.v[i], s.v[i]);
  return m;
}
PLL_INLINE vf vselect_gt(vf a, vf b, vf x, vf y) {
  PLL_EACH y.v[i] = pick((i4)(a.v[i] > b.v[i]), x.v[i], y.v[i]);
  return y;
}
PLL_INLINE vf vround(vf a) {
  // |a| + 2^23 leaves no bits below the point; from 2^23 on a is integral already, or not finite.
  PLL_EACH {
    const f4 magnitude = (f4)((u4)a.v[i] & splat_bits(0x7fffffffu));
    const f4 rounded = (magnitude + splat(0x1p23f)) - splat(0x1p23f);
    a.v[i] = pick((i4)(magnitude < splat(0x1p23f)), copysign4(rounded, a.v[i]), a.v[i]);
  }
  return a;
}
PLL_INLINE vf vscale2(vf a, vf n) {
  PLL_EACH {
    const f4 finite = pick((i4)(n.v[i] == n.v[i]), n.v[i], splat(0.0f));
    const i4 e = __builtin_convertvector(finite, i4);
    const i4 half = e >> 1;
    const i4 rest = e - half;
    a.v[i] = a.v[i] * (f4)((u4)(half + 127) << 23) * (f4)((u4)(rest + 127) << 23);
  }
  return a;
}
PLL_INLINE u4 load_u16(const uint16_t* p) {
  h4 h;
  memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, u4);
}
PLL_INLINE vf vload_bf16(const uint16_t* p) {
  vf r;
  PLL_EACH r.v[i] = (f4)(load_u16(p + 4 * i) << 16);
  return r;
}
PLL_INLINE vf vload_f16(const uint16_t* p) {
  vf r;
  PLL_EACH {  // as f16_to_f32
    const u4 h = load_u16(p + 4 * i);
    const u4 magnitude = h & splat_bits(0x7fffu);
    const u4 special = (u4)(magnitude >= splat_bits(0x7c00u));
    const u4 value = (u4)((f4)(magnitude << 13) * splat(0x1p112f));
    const u4 other = splat_bits(0x7f800000u) | ((magnitude & splat_bits(0x3ffu)) << 13);
    r.v[i] = (f4)((special & other) | (~special & value) | ((h & splat_bits(0x8000u)) << 16));
  }
  return r;
}
PLL_INLINE void vstore_bf16(uint16_t* p, vf a) {
  PLL_EACH for (int j = 0; j < 4; ++j) p[4 * i + j] = f32_to_bf16(a.v[i][j]);
}
#endif

// vmax and vmin return the second operand where either is NaN, as x86 does.

// Sum and maximum over the lanes: pairs (i, i+8), then (i, i+4), (i, i+2), (i, i+1).
#if PLL_ISA > PLL_ISA_SCALAR
PLL_INLINE float vreduce_add(vf a) {
  const __m256 x = _mm256_add_ps(vlow(a), vhigh(a));
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
PLL_INLINE float vreduce_max(vf a) {
  const __m256 x = _mm256_max_ps(vlow(a), vhigh(a));
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#else
PLL_INLINE float vreduce_add(vf a) {
  const f4 x = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (x[0] + x[2]) + (x[1] + x[3]);
}
PLL_INLINE float vreduce_max(vf a) {
  const vf upper = {{a.v[2], a.v[3], a.v[2], a.v[3]}};
  const vf pair = vmax(a, upper);
  const f4 x = pick((i4)(pair.v[0] > pair.v[1]), pair.v[0], pair.v[1]);
  const float even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
  return even > odd ? even : odd;
}
#endif

// --- functions -------------------------------------------------------------------------------

// (e^r - 1) for |r| <= ln(2) / 2: the Taylor series to r^8, whose remainder is below 0.01 ulp.
PLL_INLINE vf vexpm1_small(vf r) {
  vf p = vset1(1.0f / 40320);
  p = vfma(p, r, vset1(1.0f / 5040));
  p = vfma(p, r, vset1(1.0f / 720));
  p = vfma(p, r, vset1(1.0f / 120));
  p = vfma(p, r, vset1(1.0f / 24));
  p = vfma(p, r, vset1(1.0f / 6));
  p = vfma(p, r, vset1(0.5f));
  return vfma(vmul(p, r), r, r);
}

// x = n ln(2) + r (Cody and Waite, ln 2 in two parts).
PLL_INLINE vf vexp_reduce(vf x, vf* r) {
  const vf n = vround(vmul(x, vset1(1.44269504088896f)));
  *r = vfma(n, vset1(-1.42860677e-6f), vfma(n, vset1(-0.693145752f), x));
  return n;
}

// e^x within 2 ulp; overflow is infinity, -infinity is 0, NaN stays.
PLL_INLINE vf vexp(vf x) {
  x = vmin(vset1(89.0f), vmax(vset1(-104.0f), x));
  vf r;
  const vf n = vexp_reduce(x, &r);
  return vscale2(vadd(vset1(1.0f), vexpm1_small(r)), n);
}

// tanh(x) within 3 ulp: -t / (2 + t) with t = e^(-2|x|) - 1 kept exact near 0.
PLL_INLINE vf vtanh(vf x) {
  const vf a = vmin(vset1(10.0f), vabs(x));
  vf r;
  const vf n = vexp_reduce(vmul(vset1(-2.0f), a), &r);
  const vf scale = vscale2(vset1(1.0f), n);
  const vf t = vfma(scale, vexpm1_small(r), vsub(scale, vset1(1.0f)));
  const vf y = vdiv(vsub(vzero(), t), vadd(vset1(2.0f), t));
  return vcopysign(y, x);
}

}  // namespace pyllmlite::PLL_NS

#endif

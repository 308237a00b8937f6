// A vector of 16 int32, `vi`, and the dot products of 8-bit codes that the packed formats need.
//
// A weight vector is 64 bytes: lane r holds four consecutive codes of panel row r.  All sums are
// exact integers, so that every instruction set gives the same bits.  (The dot products of AVX2 and
// AVX-VNNI are in linear_int256.cpp.)
#ifndef PYLLMLITE_CPU_SIMD_INT_H
#define PYLLMLITE_CPU_SIMD_INT_H

#include "simd.h"

namespace pyllmlite::PLL_NS {

#if PLL_ISA >= PLL_ISA_AVX512
struct vi {
  __m512i v;
};

PLL_INLINE vi vi_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
PLL_INLINE vi vi_load(const void* p) { return {_mm512_loadu_si512(p)}; }
PLL_INLINE vf vi_to_vf(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }

// What int8 codes are added to before they are multiplied: VPDPBUSD wants them unsigned.
static constexpr int32_t I8_OFFSET = 128;
PLL_INLINE vi i8_prepare(vi w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8((char)0x80))}; }
PLL_INLINE vi i8_dot(vi sum, vi w, vi x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
PLL_INLINE vi u4_low(vi w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
PLL_INLINE vi u4_high(vi w) {
  return {_mm512_and_si512(_mm512_srli_epi32(w.v, 4), _mm512_set1_epi8(15))};
}
PLL_INLINE vi u4_dot(vi sum, vi w, vi x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }

// Byte BYTE of every lane as a signed number.
template <int BYTE>
PLL_INLINE vf i8_decode(vi w) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w.v, 24 - 8 * BYTE), 24))};
}
// The nibble at bit SHIFT of every lane, minus 8 where it is SIGNED.
template <int SHIFT, bool SIGNED>
PLL_INLINE vf u4_decode(vi w) {
  const __m512 table =
      SIGNED ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
             : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, SHIFT), table)};
}
// To the nearest integers, ties to even.
PLL_INLINE vi vi_round(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
PLL_INLINE vi vi_add(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
PLL_INLINE vi vi_max(vi a, vi b) { return {_mm512_max_epi32(a.v, b.v)}; }
// |a|'s bits, which order as the numbers do; infinity and NaN come last.
PLL_INLINE vi vi_abs_bits(vf a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
PLL_INLINE int32_t vi_reduce_add(vi a) { return _mm512_reduce_add_epi32(a.v); }
PLL_INLINE int32_t vi_reduce_max(vi a) { return _mm512_reduce_max_epi32(a.v); }
// Integers in [-127, 127] to 16 bytes.
PLL_INLINE void vi_store_i8(int8_t* p, vi a) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v));
}

#elif PLL_ISA >= PLL_ISA_AVX2
struct vi {
  __m256i lo, hi;
};

PLL_INLINE vi vi_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PLL_INLINE vi vi_load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
PLL_INLINE vf vi_to_vf(vi a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// In a register from here on.  GCC would otherwise add products in a tree, for which registers run
// out, and load a weight twice.
PLL_INLINE __m256i fixed(__m256i v) {
  asm("" : "+x"(v));
  return v;
}

static constexpr int32_t I8_OFFSET = PLL_ISA == PLL_ISA_AVX_VNNI ? 128 : 0;
#if PLL_ISA == PLL_ISA_AVX_VNNI
// VPDPBUSD: sum + u[0] s[0] + ... + u[3] s[3] of every lane, bytes u unsigned, s signed.
PLL_INLINE __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, u, s);
#else  // avx_vnni_evex: AVX-512's encoding of it
  return _mm256_dpbusd_epi32(sum, u, s);
#endif
}
#endif

template <int BYTE>
PLL_INLINE vf i8_decode(vi w) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w.lo, 24 - 8 * BYTE), 24)),
          _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(w.hi, 24 - 8 * BYTE), 24))};
}
template <int SHIFT, bool SIGNED>
PLL_INLINE __m256 u4_decode_half(__m256i w) {
  const __m256i code = _mm256_and_si256(_mm256_srli_epi32(w, SHIFT), _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(SIGNED ? _mm256_sub_epi32(code, _mm256_set1_epi32(8)) : code);
}
template <int SHIFT, bool SIGNED>
PLL_INLINE vf u4_decode(vi w) {
  return {u4_decode_half<SHIFT, SIGNED>(w.lo), u4_decode_half<SHIFT, SIGNED>(w.hi)};
}
PLL_INLINE vi vi_round(vf a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
PLL_INLINE vi vi_add(vi a, vi b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
PLL_INLINE vi vi_max(vi a, vi b) {
  return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
}
PLL_INLINE vi vi_abs_bits(vf a) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(a.lo), mask),
          _mm256_and_si256(_mm256_castps_si256(a.hi), mask)};
}
PLL_INLINE int32_t vi_reduce_add(vi a) {
  const __m256i x = _mm256_add_epi32(a.lo, a.hi);
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
PLL_INLINE int32_t vi_reduce_max(vi a) {
  const __m256i x = _mm256_max_epi32(a.lo, a.hi);
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
PLL_INLINE void vi_store_i8(int8_t* p, vi a) {
  // Packing works within 128-bit halves: words 0-3 8-11 4-7 12-15, put right at the end.
  const __m256i words = _mm256_packs_epi32(a.lo, a.hi);
  const __m256i order = _mm256_permute4x64_epi64(words, 0xd8);
  const __m256i bytes = _mm256_packs_epi16(order, order);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(bytes, 0xd8)));
}

#else
typedef int16_t s8 __attribute__((vector_size(16)));
typedef uint16_t us8 __attribute__((vector_size(16)));
typedef int8_t b4 __attribute__((vector_size(4)));

struct vi {
  i4 v[4];
};

PLL_INLINE vi vi_set1(int32_t x) {
  vi r;
  PLL_EACH r.v[i] = i4{x, x, x, x};
  return r;
}
PLL_INLINE vi vi_load(const void* p) {
  vi r;
  memcpy(&r, p, sizeof(r));
  return r;
}
PLL_INLINE vf vi_to_vf(vi a) {
  vf r;
  PLL_EACH r.v[i] = __builtin_convertvector(a.v[i], f4);
  return r;
}

static constexpr int32_t I8_OFFSET = 0;
PLL_INLINE vi i8_prepare(vi w) { return w; }
// Bytes as the even and odd halves of 16-bit lanes; |w| <= 128 and |x| <= 127, so that a pair's
// sum, at most 32512, fits 16 bits.
PLL_INLINE s8 even_bytes(i4 a) { return (s8)((us8)a << 8) >> 8; }
PLL_INLINE s8 odd_bytes(i4 a) { return (s8)a >> 8; }
PLL_INLINE vi i8_dot(vi sum, vi w, vi x) {
  PLL_EACH {
    const s8 even = even_bytes(w.v[i]) * even_bytes(x.v[i]);
    const s8 pairs = even + odd_bytes(w.v[i]) * odd_bytes(x.v[i]);
    sum.v[i] = sum.v[i] + ((i4)((u4)pairs << 16) >> 16) + ((i4)pairs >> 16);
  }
  return sum;
}
PLL_INLINE vi u4_low(vi w) {
  PLL_EACH w.v[i] = (i4)((u4)w.v[i] & splat_bits(0x0f0f0f0fu));
  return w;
}
PLL_INLINE vi u4_high(vi w) {
  PLL_EACH w.v[i] = (i4)(((u4)w.v[i] >> 4) & splat_bits(0x0f0f0f0fu));
  return w;
}
PLL_INLINE vi u4_dot(vi sum, vi w, vi x) { return i8_dot(sum, w, x); }

template <int BYTE>
PLL_INLINE vf i8_decode(vi w) {
  vf r;
  PLL_EACH r.v[i] = __builtin_convertvector((i4)((u4)w.v[i] << (24 - 8 * BYTE)) >> 24, f4);
  return r;
}
template <int SHIFT, bool SIGNED>
PLL_INLINE vf u4_decode(vi w) {
  vf r;
  PLL_EACH {
    const i4 code = (i4)(((u4)w.v[i] >> SHIFT) & splat_bits(15));
    r.v[i] = __builtin_convertvector(SIGNED ? code - 8 : code, f4);
  }
  return r;
}
PLL_INLINE vi vi_round(vf a) {
  const vf whole = vround(a);
  vi r;
  PLL_EACH r.v[i] = __builtin_convertvector(whole.v[i], i4);
  return r;
}
PLL_INLINE vi vi_add(vi a, vi b) {
  PLL_EACH a.v[i] += b.v[i];
  return a;
}
PLL_INLINE vi vi_max(vi a, vi b) {
  PLL_EACH {
    const i4 greater = a.v[i] > b.v[i];
    a.v[i] = (a.v[i] & greater) | (b.v[i] & ~greater);
  }
  return a;
}
PLL_INLINE vi vi_abs_bits(vf a) {
  vi r;
  PLL_EACH r.v[i] = (i4)((u4)a.v[i] & splat_bits(0x7fffffffu));
  return r;
}
PLL_INLINE int32_t vi_reduce_add(vi a) {
  const i4 x = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (x[0] + x[2]) + (x[1] + x[3]);
}
PLL_INLINE int32_t vi_reduce_max(vi a) {
  const vi x = vi_max(a, vi{{a.v[1], a.v[0], a.v[3], a.v[2]}});
  const i4 y = vi_max(x, vi{{x.v[2], x.v[3], x.v[0], x.v[1]}}).v[0];
  const int32_t even = y[0] > y[2] ? y[0] : y[2], odd = y[1] > y[3] ? y[1] : y[3];
  return even > odd ? even : odd;
}
PLL_INLINE void vi_store_i8(int8_t* p, vi a) {
  PLL_EACH {
    const b4 bytes = __builtin_convertvector(a.v[i], b4);
    memcpy(p + 4 * i, &bytes, 4);
  }
}
#endif

}  // namespace pyllmlite::PLL_NS

#endif

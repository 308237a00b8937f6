// The loops behind pyllmlite/peaks.h: full-width loads, and dot products of a tile that stays in
// registers, as in the inner loop of a matrix product that never misses a cache.
#include "pyllmlite/peaks.h"

#include "simd_int.h"

namespace pyllmlite::PLL_NS {
namespace {

#define PLL_UNROLLED _Pragma("GCC unroll 16") for

// --- reading ---------------------------------------------------------------------------------

constexpr int UNROLL = 8;
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int WORDS = 8;
#elif PLL_ISA >= PLL_ISA_AVX2
constexpr int WORDS = 4;
#else
constexpr int WORDS = 2;
#endif
typedef uint64_t words __attribute__((vector_size(8 * WORDS), aligned(8), may_alias));

// --- multiplying -----------------------------------------------------------------------------

// Sums of a tile: enough to hide an instruction's latency, few enough for the registers.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int ROWS = 4, COLS = 4;
#elif PLL_ISA >= PLL_ISA_AVX2
constexpr int ROWS = 2, COLS = 2;
#else
constexpr int ROWS = 2, COLS = 1;
#endif

struct F32 {
  using Sum = vf;
  static constexpr float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  static vf load(const float* p) { return vload(p); }
  static vf zero() { return vzero(); }
  static vf add(vf sum, vf a, vf b) { return vfma(a, b, sum); }
  static vf lanes(vf sum) { return sum; }
};

#if PLL_ISA == PLL_ISA_AVX_VNNI
PLL_INLINE vi u4_dot(vi sum, vi u, vi s) {
  return {fixed(dpbusd(sum.lo, u.lo, s.lo)), fixed(dpbusd(sum.hi, u.hi, s.hi))};
}
#elif PLL_ISA == PLL_ISA_AVX2
// In 16 bits, as linear_int256.cpp adds up int4 codes.
PLL_INLINE vi u4_dot(vi sum, vi u, vi s) {
  return {fixed(_mm256_add_epi16(sum.lo, _mm256_maddubs_epi16(u.lo, s.lo))),
          fixed(_mm256_add_epi16(sum.hi, _mm256_maddubs_epi16(u.hi, s.hi)))};
}
PLL_INLINE vi add_wide(vi wide, vi narrow) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(wide.lo, _mm256_madd_epi16(narrow.lo, one)),
          _mm256_add_epi32(wide.hi, _mm256_madd_epi16(narrow.hi, one))};
}
#endif

struct Int8 {
  using Sum = vi;
  static constexpr uint32_t ones[16] = {
      0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101,
      0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x01010101,
      0x01010101, 0x01010101, 0x01010101, 0x01010101};
  static vi load(const uint32_t* p) { return vi_load(p); }
  static vi zero() { return vi_set1(0); }
  static vi add(vi sum, vi a, vi b) { return u4_dot(sum, a, b); }
  static vf lanes(vi sum) { return vi_to_vf(sum); }
};

template <class Product>
constexpr bool is_int8 = false;
template <>
constexpr bool is_int8<Int8> = true;

#if PLL_ISA >= PLL_ISA_AVX512_BF16
struct Bf16 {
  using Sum = vf;
  static constexpr uint32_t ones[16] = {
      0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80,
      0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80,
      0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  static __m512bh load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf zero() { return vzero(); }
  static vf add(vf sum, __m512bh a, __m512bh b) { return {_mm512_dpbf16_ps(sum.v, a, b)}; }
  static vf lanes(vf sum) { return sum; }
};
#else
using Bf16 = F32;
#endif

// To the compiler every call gives another pointer: so it moves no load and no product out of
// the loop, and never makes one of two.
template <class T>
PLL_INLINE const T* another(const T* p) {
  asm volatile("" : "+r"(p));
  return p;
}

// ROWS vectors of ones by COLS others, added to a tile of sums.
template <class Product>
PLL_INLINE void multiply_once(typename Product::Sum (&sums)[ROWS][COLS]) {
  decltype(Product::load(Product::ones)) b[COLS];
  PLL_UNROLLED(int j = 0; j < COLS; ++j) b[j] = Product::load(another(Product::ones));
  PLL_UNROLLED(int i = 0; i < ROWS; ++i) {
    const auto a = Product::load(another(Product::ones));
    PLL_UNROLLED(int j = 0; j < COLS; ++j) sums[i][j] = Product::add(sums[i][j], a, b[j]);
  }
}

// That `rounds` times: the sums' total.
template <class Product>
double multiply(int64_t rounds) {
  typename Product::Sum sums[ROWS][COLS];
  PLL_UNROLLED(int t = 0; t < ROWS * COLS; ++t) sums[t / COLS][t % COLS] = Product::zero();
#if PLL_ISA == PLL_ISA_AVX2
  if constexpr (is_int8<Product>) {
    // Eight rounds are as many as 16 bits hold of 4-bit codes by 8-bit ones.
    for (; rounds > 0; rounds -= 8) {
      vi narrow[ROWS][COLS];
      PLL_UNROLLED(int t = 0; t < ROWS * COLS; ++t) narrow[t / COLS][t % COLS] = vi_set1(0);
      if (rounds >= 8) {
        PLL_UNROLLED(int i = 0; i < 8; ++i) multiply_once<Product>(narrow);
      } else {
        for (int64_t i = 0; i < rounds; ++i) multiply_once<Product>(narrow);
      }
      PLL_UNROLLED(int t = 0; t < ROWS * COLS; ++t) {
        sums[t / COLS][t % COLS] = add_wide(sums[t / COLS][t % COLS], narrow[t / COLS][t % COLS]);
      }
    }
  }
#endif
  for (int64_t round = 0; round < rounds; ++round) multiply_once<Product>(sums);
  vf all = vzero();
  PLL_UNROLLED(int t = 0; t < ROWS * COLS; ++t) {
    all = vadd(all, Product::lanes(sums[t / COLS][t % COLS]));
  }
  float lanes[VF];
  vstore(lanes, all);
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

}  // namespace

uint64_t peak_read(const uint64_t* data, int64_t count) {
  constexpr int64_t STEP = UNROLL * WORDS;
  const int64_t whole = count / STEP * STEP;
  words sums[UNROLL] = {};
  for (int64_t at = 0; at < whole; at += STEP) {
    PLL_UNROLLED(int u = 0; u < UNROLL; ++u) sums[u] += *(const words*)(data + at + u * WORDS);
  }
  uint64_t total = 0;
  for (int t = 0; t < UNROLL * WORDS; ++t) total += sums[t / WORDS][t % WORDS];
  for (int64_t i = whole; i < count; ++i) total += data[i];
  return total;
}

double peak_multiply(PeakKind kind, int64_t rounds) {
  if (kind == PeakKind::INT8) return multiply<Int8>(rounds);
  if (kind == PeakKind::BF16) return multiply<Bf16>(rounds);
  return multiply<F32>(rounds);
}

}  // namespace pyllmlite::PLL_NS

// Codes of INT8, INT4 and CODEBOOK4 weights back as numbers, a column of 16 weight rows at a time.
//
// A decoder is made of a packed matrix once a tile.  64 bytes of a panel hold STEP columns;
// get<J>(those 64 bytes) is column J of them as floats, before scale and minimum.
#ifndef PYLLMLITE_CPU_LINEAR_DECODE_H
#define PYLLMLITE_CPU_LINEAR_DECODE_H

#include "simd_int.h"

namespace pyllmlite::PLL_NS {

struct ByteDecoder {
  static constexpr int64_t STEP = 4;
  explicit ByteDecoder(const PackedLinear&) {}
  template <int J>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return i8_decode<J>(w);
  }
};

// The bit at which the code of column J of eight begins: low nibbles of four bytes, then high ones.
constexpr int nibble_shift(int j) { return j < 4 ? 8 * j : 8 * j - 28; }

// SIGNED: 8 is taken off, as where there are no minimums.
template <bool SIGNED>
struct NibbleDecoder {
  static constexpr int64_t STEP = 8;
  explicit NibbleDecoder(const PackedLinear&) {}
  template <int J>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return u4_decode<nibble_shift(J), SIGNED>(w);
  }
};

// One of 16 floats that stand in registers (NF4, FP4: QLoRA, Dettmers et al. 2023).
#if PLL_ISA >= PLL_ISA_AVX512
struct CodebookDecoder {
  static constexpr int64_t STEP = 8;
  __m512 table;
  explicit CodebookDecoder(const PackedLinear& w) : table(_mm512_loadu_ps(w.codebook)) {}
  template <int J>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, nibble_shift(J)), table)};
  }
};
#elif PLL_ISA >= PLL_ISA_AVX2
struct CodebookDecoder {
  static constexpr int64_t STEP = 8;
  __m256 low, high;  // values 0 to 7 and 8 to 15
  explicit CodebookDecoder(const PackedLinear& w)
      : low(_mm256_loadu_ps(w.codebook)), high(_mm256_loadu_ps(w.codebook + 8)) {}
  // VPERMPS reads the low three bits of an index; bit 3, moved to the sign, picks the half.
  template <int SHIFT>
  inline __attribute__((always_inline)) __m256 half(__m256i w) const {
    const __m256i index = _mm256_srli_epi32(w, SHIFT);
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(w, 28 - SHIFT));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), sign);
  }
  template <int J>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return {half<nibble_shift(J)>(w.lo), half<nibble_shift(J)>(w.hi)};
  }
};
#else
struct CodebookDecoder {
  static constexpr int64_t STEP = 8;
  const float* values;
  explicit CodebookDecoder(const PackedLinear& w) : values(w.codebook) {}
  template <int J>
  inline __attribute__((always_inline)) vf get(vi w) const {
    vf r;
    PLL_EACH for (int j = 0; j < 4; ++j) {
      r.v[i][j] = values[(static_cast<uint32_t>(w.v[i][j]) >> nibble_shift(J)) & 15];
    }
    return r;
  }
};
#endif

}  // namespace pyllmlite::PLL_NS

#endif

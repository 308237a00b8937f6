// Tile kernels for F32 and BF16 weights.

#include "linear_impl.h"

namespace pyllmlite::PLL_NS {
namespace {

template <int ROWS, int PANELS>
struct Accumulators {
  vf v[ROWS][PANELS];

  inline __attribute__((always_inline)) void load(const TileArgs& a) {
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const float* from = a.acc + r * a.acc_stride;
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) v[r][p] = vload(from + p * 16);
    }
  }
  inline __attribute__((always_inline)) void store(const TileArgs& a) const {
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      float* to = a.acc + r * a.acc_stride;
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) vstore(to + p * 16, v[r][p]);
    }
  }
};

template <int ROWS, int PANELS>
struct F32Kernel {
  static void run(const TileArgs& a) {
    const float* w[PANELS];
    const float* x[ROWS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p)
        w[p] = reinterpret_cast<const float*>(a.weight + p * a.panel_bytes);
    PLL_UNROLL for (int r = 0; r < ROWS; ++r)
        x[r] = reinterpret_cast<const float*>(a.rows + r * a.row->bytes);
    Accumulators<ROWS, PANELS> acc;
    acc.load(a);
    for (int64_t k = a.k0; k < a.k1; ++k) {
      vf b[PANELS];
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        b[p] = vload(w[p] + k * 16);
        if (ROWS * PANELS <= 16) prefetch(w[p] + k * 16 + a.ahead / 4);
      }
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vf value = vset1(x[r][k]);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) acc.v[r][p] = vfma(value, b[p], acc.v[r][p]);
      }
    }
    acc.store(a);
  }
};

#if PLL_ISA >= PLL_ISA_AVX512_BF16
// VDPBF16PS takes a pair of columns at once: even column, then odd, each rounded.
template <int ROWS, int PANELS>
struct BF16Kernel {
  static void run(const TileArgs& a) {
    const uint8_t* w[PANELS];
    const RowPointers<ROWS> x(a);
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
    Accumulators<ROWS, PANELS> acc;
    acc.load(a);
    const int64_t end = (a.k1 + 1) / 2;
    for (int64_t i = a.k0 / 2; i < end; ++i) {
      __m512bh b[PANELS];
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        b[p] = (__m512bh)_mm512_loadu_si512(w[p] + i * 64);
        if (ROWS * PANELS <= 16) prefetch(w[p] + i * 64 + a.ahead);
      }
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        int32_t pair;
        memcpy(&pair, x.get(r, i * 4), 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p)
            acc.v[r][p].v = _mm512_dpbf16_ps(acc.v[r][p].v, value, b[p]);
      }
    }
    acc.store(a);
  }
};
#else
// The even and the odd column of 16 pairs, as floats.
#if PLL_ISA >= PLL_ISA_AVX512
PLL_INLINE void load_pairs(const uint8_t* p, vf* even, vf* odd) {
  const __m512i u = _mm512_loadu_si512(p);
  even->v = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
  odd->v = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000u)));
}
#elif PLL_ISA >= PLL_ISA_AVX2
PLL_INLINE void load_pairs(const uint8_t* p, vf* even, vf* odd) {
  const __m256i lo = _mm256_loadu_si256((const __m256i*)p);
  const __m256i hi = _mm256_loadu_si256((const __m256i*)p + 1);
  const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  *even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
           _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  *odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)),
          _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
}
#else
PLL_INLINE void load_pairs(const uint8_t* p, vf* even, vf* odd) {
  u4 u[4];
  memcpy(u, p, sizeof(u));
  PLL_EACH {
    even->v[i] = (f4)(u[i] << 16);
    odd->v[i] = (f4)(u[i] & splat_bits(0xffff0000u));
  }
}
#endif

template <int ROWS, int PANELS>
struct BF16Kernel {
  static void run(const TileArgs& a) {
    const uint8_t* w[PANELS];
    const float* x[ROWS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
    PLL_UNROLL for (int r = 0; r < ROWS; ++r)
        x[r] = reinterpret_cast<const float*>(a.rows + r * a.row->bytes);
    Accumulators<ROWS, PANELS> acc;
    acc.load(a);
    const int64_t end = (a.k1 + 1) / 2;
    for (int64_t i = a.k0 / 2; i < end; ++i) {
      vf even[PANELS], odd[PANELS];
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        load_pairs(w[p] + i * 64, &even[p], &odd[p]);
        if (ROWS * PANELS <= 16) prefetch(w[p] + i * 64 + a.ahead);
      }
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vf value = vset1(x[r][2 * i]);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p)
            acc.v[r][p] = vfma(value, even[p], acc.v[r][p]);
      }
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vf value = vset1(x[r][2 * i + 1]);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p)
            acc.v[r][p] = vfma(value, odd[p], acc.v[r][p]);
      }
    }
    acc.store(a);
  }
};
#endif

}  // namespace

TileKernel float_kernel(WeightFormat format, int rows, int panels) {
  return format == WeightFormat::F32 ? KernelTable<F32Kernel, MAX_ROWS>::find(rows, panels)
                                     : KernelTable<BF16Kernel, MAX_ROWS>::find(rows, panels);
}

}  // namespace pyllmlite::PLL_NS

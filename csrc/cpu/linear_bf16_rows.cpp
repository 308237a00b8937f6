// Tile kernels for INT8, INT4 and CODEBOOK4 weights with bf16 rows, on machines with a bf16 dot
// product (VDPBF16PS).
//
// Codes of up to 8 bits are exact in bf16 (a codebook's values were rounded to it), so that the
// inputs' rounding is the only one.  A segment is a chain of dot products over pairs of columns
// from zero, added to the output with one multiply-add by the group's scale (and one by its
// minimum and the segment's sum of inputs).  The chain is the same for any number of rows.
//
// A pair is what two 16-bit halves of a 32-bit lane hold at the same place of their bytes: columns
// 0 and 2, 1 and 3, and so on.  Rows stand in that order too (linear_rows.cpp).

#include "linear_segments.h"

namespace pyllmlite::PLL_NS {

#if PLL_ISA >= PLL_ISA_AVX512_BF16
namespace {

// 4-bit codes: a lookup in a register.  VPERMW reads five bits of an index, the fifth of which
// belongs to another code: so the table holds its 16 values twice.
struct NibblePairs {
  static constexpr int64_t STEP = 8;
  __m512i table;

  explicit NibblePairs(const TileArgs& a) {
    const __m512i codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i signed_codes = _mm512_sub_epi32(codes, _mm512_set1_epi32(a.mins ? 0 : 8));
    const __m512 values = a.packed->format == WeightFormat::CODEBOOK4
                              ? _mm512_loadu_ps(a.packed->codebook)
                              : _mm512_cvtepi32_ps(signed_codes);
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
    table = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(upper));
  }
  template <int J>
  inline __attribute__((always_inline)) __m512bh get(__m512i raw) const {
    constexpr int SHIFTS[] = {0, 8, 4, 12};
    constexpr int SHIFT = SHIFTS[J];
    const __m512i index = SHIFT == 0 ? raw : _mm512_srli_epi16(raw, SHIFT);
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
};

// 8-bit codes, by way of floats, whose upper halves they fill.
struct BytePairs {
  static constexpr int64_t STEP = 4;
  __m512i upper_halves;

  explicit BytePairs(const TileArgs&) {
    alignas(64) static constexpr uint16_t ODD[32] = {
        1,  33, 3,  35, 5,  37, 7,  39, 9,  41, 11, 43, 13, 45, 15, 47,
        17, 49, 19, 51, 21, 53, 23, 55, 25, 57, 27, 59, 29, 61, 31, 63};
    upper_halves = _mm512_load_si512(ODD);
  }
  template <int J>
  inline __attribute__((always_inline)) __m512bh get(__m512i raw) const {
    const __m512 first = i8_decode<J>(vi{raw}).v, second = i8_decode<J + 2>(vi{raw}).v;
    return (__m512bh)_mm512_permutex2var_epi16(_mm512_castps_si512(first), upper_halves,
                                               _mm512_castps_si512(second));
  }
};

// part[r][p] += the pair of columns that stands J-th behind column k, times w.
template <int ROWS, int PANELS>
inline __attribute__((always_inline)) void add_pair(vf (&part)[ROWS][PANELS],
                                                    const __m512bh (&w)[PANELS],
                                                    const RowPointers<ROWS>& x, int64_t at) {
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
    int32_t pair;
    memcpy(&pair, x.get(r, at), 4);
    const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
    PLL_UNROLL for (int p = 0; p < PANELS; ++p)
        part[r][p].v = _mm512_dpbf16_ps(part[r][p].v, value, w[p]);
  }
}

// The outputs of a tile.  Where they fit the registers beside the sums they stay there: at groups
// of 32 loading and storing them took a tenth of the time.
template <int ROWS, int PANELS, bool MINS>
struct Outputs {
  static constexpr bool KEPT = ROWS * PANELS <= 12;
  vf v[KEPT ? ROWS : 1][PANELS];

  inline __attribute__((always_inline)) void load(const TileArgs& a) {
    if constexpr (KEPT) {
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        PLL_UNROLL for (int p = 0; p < PANELS; ++p)
            v[r][p] = vload(a.acc + r * a.acc_stride + p * 16);
      }
    }
  }
  inline __attribute__((always_inline)) void store(const TileArgs& a) const {
    if constexpr (KEPT) {
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        PLL_UNROLL for (int p = 0; p < PANELS; ++p)
            vstore(a.acc + r * a.acc_stride + p * 16, v[r][p]);
      }
    }
  }
  // The same operations as add_segment's.
  inline __attribute__((always_inline)) void add(const TileArgs& a, const Segment& s,
                                                 const vf (&part)[ROWS][PANELS]) {
    float row_sum[ROWS];
    if constexpr (MINS || !KEPT) load_row_sums<ROWS>(a, s, row_sum);
    if constexpr (!KEPT) {
      add_segment<ROWS, PANELS>(a, s, part, row_sum);
    } else {
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        const int64_t at = p * a.panel_scales + s.group * 16;
        const vf scale = load_scales(*a.packed, a.scales, at);
        ask_ahead<PANELS>(scales_at(*a.packed, a.scales, at + a.ahead_scales));
        PLL_UNROLL for (int r = 0; r < ROWS; ++r) v[r][p] = vfma(part[r][p], scale, v[r][p]);
        if constexpr (MINS) {
          ask_ahead<PANELS>(scales_at(*a.packed, a.mins, at + a.ahead_scales));
          vf min = load_scales(*a.packed, a.mins, at);
          if (a.packed->zero_points) min = vmul(vsub(vzero(), scale), min);
          PLL_UNROLL for (int r = 0; r < ROWS; ++r)
              v[r][p] = vfma(min, vset1(row_sum[r]), v[r][p]);
        }
      }
    }
  }
};

template <int ROWS, int PANELS, class Pairs, bool MINS>
inline __attribute__((always_inline)) void run_bf16_rows(const TileArgs& a) {
  const Pairs pairs(a);
  const uint8_t* w[PANELS];
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
  const RowPointers<ROWS> x(a);
  Outputs<ROWS, PANELS, MINS> out;
  out.load(a);
  each_segment(a, [&](const Segment& s) {
    vf part[ROWS][PANELS];
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) part[r][p] = vzero();
    }
    for (int64_t k = s.k0; k < s.k1; k += Pairs::STEP) {
      __m512i raw[PANELS];
      __m512bh code[PANELS];
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        const uint8_t* from = w[p] + k * (64 / Pairs::STEP);
        raw[p] = _mm512_loadu_si512(from);
        if (ROWS * PANELS <= 16) ask_ahead<PANELS>(from + a.ahead);
      }
#define PLL_PAIR(j)                                                                        \
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) code[p] = pairs.template get<j>(raw[p]); \
  add_pair<ROWS, PANELS>(part, code, x, 2 * k + 4 * (j))
      PLL_PAIR(0);
      PLL_PAIR(1);
      if constexpr (Pairs::STEP == 8) {
        PLL_PAIR(2);
        PLL_PAIR(3);
      }
#undef PLL_PAIR
    }
    out.add(a, s, part);
  });
  out.store(a);
}

template <int ROWS, int PANELS, class Pairs>
inline __attribute__((always_inline)) void run_with_or_without_mins(const TileArgs& a) {
  if (a.mins) {
    run_bf16_rows<ROWS, PANELS, Pairs, true>(a);
  } else {
    run_bf16_rows<ROWS, PANELS, Pairs, false>(a);
  }
}
template <int ROWS, int PANELS>
struct Int8Bf16Rows {
  static void run(const TileArgs& a) { run_with_or_without_mins<ROWS, PANELS, BytePairs>(a); }
};
template <int ROWS, int PANELS>
struct NibbleBf16Rows {
  static void run(const TileArgs& a) { run_with_or_without_mins<ROWS, PANELS, NibblePairs>(a); }
};

}  // namespace

TileKernel bf16_rows_kernel(WeightFormat format, int rows, int panels) {
  if (format == WeightFormat::INT8) return KernelTable<Int8Bf16Rows, MAX_ROWS>::find(rows, panels);
  return KernelTable<NibbleBf16Rows, MAX_NIBBLE_ROWS>::find(rows, panels);
}
#else
TileKernel bf16_rows_kernel(WeightFormat format, int rows, int panels) {
  return float_rows_kernel(format, rows, panels);
}
#endif

}  // namespace pyllmlite::PLL_NS

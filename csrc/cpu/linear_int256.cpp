// Tile kernels of INT8 and INT4 weights with int8 rows, for the sets with vectors of 256 bits:
// AVX2, which multiplies bytes into sums of 16 bits, and AVX-VNNI, which does so into 32 bits.
//
// The sums are exact integers and meet the output as in linear_quant.cpp: the same bits, but where
// two segments share the weight's scale, which are added one by one here.
// A tile is one panel wide: both its halves, of 8 weight rows, use the broadcast of a row's codes.

#include "linear_segments.h"

#if PLL_ISA_IS_256

namespace pyllmlite::PLL_NS {
namespace {

// Columns that are added up at once; what remains of a segment is added in a loop.
constexpr int64_t BLOCK = 32;

// [row][half of the panel]: sums of 8 weight rows.
template <int ROWS>
struct Sums {
  __m256i v[ROWS][2];
};
#define PLL_EACH_SUM                        \
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) \
    PLL_UNROLL for (int h = 0; h < 2; ++h)

PLL_INLINE __m256i load256(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
PLL_INLINE __m256i four_codes(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
PLL_INLINE __m256 one_float(const uint8_t* p) {
  return _mm256_broadcast_ss(reinterpret_cast<const float*>(p));
}

// INT4: 64 bytes are 8 columns of a panel, four in the low nibbles and four in the high ones.
struct U4 {
  static constexpr int64_t COLUMNS = 8;
  static constexpr int64_t panel_bytes(int64_t columns) { return columns * 8; }
#if PLL_ISA == PLL_ISA_AVX_VNNI
  static constexpr bool NARROW = false;
  PLL_INLINE __m256i add(__m256i sum, __m256i u, __m256i s) { return dpbusd(sum, u, s); }
#else
  // VPMADDUBSW's sum of two products is at most 2 * 15 * 127 = 3810: those of a block's eight
  // steps of 4 columns fit 16 bits and are widened once.
  static constexpr bool NARROW = true;
  static_assert(BLOCK / 4 * 3810 <= 32767, "a block's sums must fit 16 bits");
  PLL_INLINE __m256i add(__m256i sum, __m256i u, __m256i s) {
    return fixed(_mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)));
  }
#endif
  template <int ROWS>
  PLL_INLINE void add_columns(Sums<ROWS>& sum, const uint8_t* w, const uint8_t* const (&x)[ROWS],
                              int64_t k) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i raw[2] = {load256(w), load256(w + 32)}, code[2];
    if (ROWS <= 4) PLL_UNROLL for (int h = 0; h < 2; ++h) raw[h] = fixed(raw[h]);
    PLL_UNROLL for (int h = 0; h < 2; ++h) code[h] = _mm256_and_si256(raw[h], mask);
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m256i value = four_codes(x[r] + k);
      PLL_UNROLL for (int h = 0; h < 2; ++h) sum.v[r][h] = add(sum.v[r][h], code[h], value);
    }
    PLL_UNROLL for (int h = 0; h < 2; ++h)
        code[h] = _mm256_and_si256(_mm256_srli_epi32(raw[h], 4), mask);
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m256i value = four_codes(x[r] + k + 4);
      PLL_UNROLL for (int h = 0; h < 2; ++h) sum.v[r][h] = add(sum.v[r][h], code[h], value);
    }
  }
};

// INT8: 64 bytes are 4 columns of a panel.
struct I8 {
  static constexpr int64_t COLUMNS = 4;
  static constexpr int64_t panel_bytes(int64_t columns) { return columns * 16; }
  static constexpr bool NARROW = false;
  template <int ROWS>
  PLL_INLINE void add_columns(Sums<ROWS>& sum, const uint8_t* w, const uint8_t* const (&x)[ROWS],
                              int64_t k) {
    __m256i code[2];
#if PLL_ISA == PLL_ISA_AVX_VNNI
    PLL_UNROLL for (int h = 0; h < 2; ++h)
        code[h] = _mm256_xor_si256(load256(w + 32 * h), _mm256_set1_epi8((char)0x80));
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m256i value = four_codes(x[r] + k);
      PLL_UNROLL for (int h = 0; h < 2; ++h) sum.v[r][h] = dpbusd(sum.v[r][h], code[h], value);
    }
#else
    // |w| by x with w's sign.  |w| <= 128 and |x| <= 127: VPMADDUBSW's sum of two products, at
    // most 32512, does not saturate, but no second one fits 16 bits.
    PLL_UNROLL for (int h = 0; h < 2; ++h) code[h] = _mm256_abs_epi8(load256(w + 32 * h));
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const __m256i value = four_codes(x[r] + k);
      PLL_UNROLL for (int h = 0; h < 2; ++h) {
        const __m256i pairs =
            _mm256_maddubs_epi16(code[h], _mm256_sign_epi8(value, load256(w + 32 * h)));
        const __m256i sums = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        sum.v[r][h] = fixed(_mm256_add_epi32(sum.v[r][h], sums));
      }
    }
#endif
  }
};

// total += columns [k, end) by the rows' codes, at most BLOCK of them, in steps of Codes::COLUMNS.
template <class Codes, int ROWS>
PLL_INLINE void add_block(Sums<ROWS>& total, const uint8_t* w, const uint8_t* const (&x)[ROWS],
                          int64_t k, int64_t end, int64_t ahead) {
  Sums<ROWS> narrow;
  if (Codes::NARROW) PLL_EACH_SUM narrow.v[r][h] = _mm256_setzero_si256();
  Sums<ROWS>& sum = Codes::NARROW ? narrow : total;
  if (end - k == BLOCK) {
    PLL_UNROLL for (int64_t j = 0; j < BLOCK; j += Codes::COLUMNS) {
      ask_ahead<1>(w + ahead + Codes::panel_bytes(j));
      Codes::template add_columns<ROWS>(sum, w + Codes::panel_bytes(j), x, k + j);
    }
  } else {
    for (; k < end; k += Codes::COLUMNS, w += 64) {
      ask_ahead<1>(w + ahead);
      Codes::template add_columns<ROWS>(sum, w, x, k);
    }
  }
  if (Codes::NARROW) {
    const __m256i ones = _mm256_set1_epi16(1);
    PLL_EACH_SUM total.v[r][h] =
        _mm256_add_epi32(total.v[r][h], _mm256_madd_epi16(narrow.v[r][h], ones));
  }
}

PLL_INLINE __m256 load_half(const PackedLinear& packed, const void* table, int64_t at) {
  return packed.wide_scales
             ? _mm256_loadu_ps(static_cast<const float*>(table) + at)
             : _mm256_cvtph_ps(_mm_loadu_si128(
                   reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(table) + at)));
}

// As add_segment.  RAISED: the sums begin with what the rows' records say.
template <int ROWS, bool MINS, bool RAISED>
PLL_INLINE void add_scaled(const TileArgs& a, const RowLayout& row, const Segment& s,
                           const Sums<ROWS>& total, const uint8_t* const (&x)[ROWS]) {
  const int64_t at = s.group * 16;
  __m256 scale[2], min[2];
  PLL_UNROLL for (int h = 0; h < 2; ++h) scale[h] = load_half(*a.packed, a.scales, at + 8 * h);
  ask_ahead<1>(scales_at(*a.packed, a.scales, at + a.ahead_scales));
  if (MINS) {
    ask_ahead<1>(scales_at(*a.packed, a.mins, at + a.ahead_scales));
    PLL_UNROLL for (int h = 0; h < 2; ++h) min[h] = load_half(*a.packed, a.mins, at + 8 * h);
    if (a.packed->zero_points) {
      PLL_UNROLL for (int h = 0; h < 2; ++h)
          min[h] = _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), scale[h]), min[h]);
    }
  }
  float* to = a.acc;
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
    const uint8_t* const of_segment = x[r] + 4 * s.index;
    const __m256i start = four_codes(of_segment + row.start_at);
    const __m256 row_scale = one_float(of_segment + row.scale_at);
    const __m256 row_sum = one_float(of_segment + row.sum_at);
    PLL_UNROLL for (int h = 0; h < 2; ++h) {
      const __m256i sum = RAISED ? _mm256_add_epi32(total.v[r][h], start) : total.v[r][h];
      const __m256 factor = _mm256_mul_ps(scale[h], row_scale);
      __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, _mm256_loadu_ps(to + 8 * h));
      if (MINS) value = _mm256_fmadd_ps(min[h], row_sum, value);
      _mm256_storeu_ps(to + 8 * h, value);
    }
    to += a.acc_stride;
  }
}

// ONE: every segment is one block.
template <class Codes, int ROWS, bool MINS, bool RAISED, bool ONE>
static void run_segments(const TileArgs& args) {
  const TileArgs a = args;  // copies, which no store to the output can change
  const RowLayout row = *args.row;
  const uint8_t* x[ROWS];
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) x[r] = a.rows + r * row.bytes;
  each_segment(a, [&](const Segment& s) __attribute__((always_inline)) {
    Sums<ROWS> total;
    PLL_EACH_SUM total.v[r][h] = _mm256_setzero_si256();
    const uint8_t* w = a.weight + Codes::panel_bytes(s.k0);
    if (ONE) {
      add_block<Codes, ROWS>(total, w, x, s.k0, s.k0 + BLOCK, a.ahead);
    } else {
      for (int64_t k = s.k0; k < s.k1; k += BLOCK, w += Codes::panel_bytes(BLOCK)) {
        const int64_t end = k + BLOCK < s.k1 ? k + BLOCK : s.k1;
        add_block<Codes, ROWS>(total, w, x, k, end, a.ahead);
      }
    }
    add_scaled<ROWS, MINS, RAISED>(a, row, s, total, x);
  });
}

template <class Codes, int ROWS, bool MINS, bool RAISED>
static void run_rows(const TileArgs& a) {
  if (a.row->segment == BLOCK && a.k1 % BLOCK == 0) {
    run_segments<Codes, ROWS, MINS, RAISED, true>(a);
  } else {
    run_segments<Codes, ROWS, MINS, RAISED, false>(a);
  }
}

template <int ROWS, int PANELS>
struct Int4IntRows {
  static void run(const TileArgs& a) {
    if (a.mins) {
      run_rows<U4, ROWS, true, false>(a);
    } else {
      run_rows<U4, ROWS, false, true>(a);  // codes packed with 8 added
    }
  }
};

template <int ROWS, int PANELS>
struct Int8IntRows {
  static constexpr bool RAISED = I8_OFFSET != 0;
  static void run(const TileArgs& a) {
    if (a.mins) {
      run_rows<I8, ROWS, true, RAISED>(a);
    } else {
      run_rows<I8, ROWS, false, RAISED>(a);
    }
  }
};

}  // namespace

TileKernel int256_kernel(WeightFormat format, int rows) {
  return format == WeightFormat::INT4 ? KernelTable<Int4IntRows, MAX_INT_ROWS>::find(rows, 1)
                                      : KernelTable<Int8IntRows, MAX_INT_ROWS>::find(rows, 1);
}

}  // namespace pyllmlite::PLL_NS

#endif

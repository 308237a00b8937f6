// Tile kernels for INT8 and INT4 weights with int8 rows: exact integer dot products.
//
// A segment is summed first, then added to the output with one multiply-add by the group's scale
// (and one by its minimum and the segment's sum of inputs), segments ascending; or two together.

#include "linear_segments.h"

namespace pyllmlite::PLL_NS {
namespace {

#if !PLL_ISA_IS_256
PLL_INLINE vi four_codes(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return vi_set1(four);
}
PLL_INLINE vf one_float(const uint8_t* p) {
  float x;
  memcpy(&x, p, 4);
  return vset1(x);
}

// What a tile kernel reads: panels and prepared rows.
template <int ROWS, int PANELS>
struct Operands {
  const uint8_t* w[PANELS];
  const uint8_t* x[ROWS];
};

// The exact sums of a segment.
template <int ROWS, int PANELS, bool INT4, bool MINS>
PLL_INLINE void sum_segment(const Operands<ROWS, PANELS>& from, const RowLayout& row, int64_t ahead,
                            int64_t index, int64_t k0, int64_t k1, vi (&sum)[ROWS][PANELS]) {
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
    const vi start = INT4 && MINS ? vi_set1(0) : four_codes(from.x[r] + row.start_at + 4 * index);
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) sum[r][p] = start;
  }
  // 64 bytes hold 4 columns of a panel (INT8) or 8 (INT4).
  constexpr int64_t STEP = INT4 ? 8 : 4;
  for (int64_t k = k0; k < k1; k += STEP) {
    vi low[PANELS], high[PANELS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
      const uint8_t* const at = from.w[p] + k * (64 / STEP);
      const vi raw = vi_load(at);
      ask_ahead<PANELS>(at + ahead);
      low[p] = INT4 ? u4_low(raw) : i8_prepare(raw);
      if (INT4) high[p] = u4_high(raw);
    }
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const vi value = four_codes(from.x[r] + k);
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        sum[r][p] = INT4 ? u4_dot(sum[r][p], low[p], value) : i8_dot(sum[r][p], low[p], value);
      }
    }
    if (INT4) {
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vi value = four_codes(from.x[r] + k + 4);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) sum[r][p] = u4_dot(sum[r][p], high[p], value);
      }
    }
  }
}

// PAIRS: two segments, of two activation groups, share each of the weight's scales.  Their sums
// meet in registers, times the row's scales, before the weight's scale takes them to the output.
template <int ROWS, int PANELS, bool INT4, bool MINS, bool PAIRS>
static void run_segments(const TileArgs& args) {
  const TileArgs a = args;  // copies, which no store to the output can change
  const RowLayout row = *args.row;
  const PackedLinear packed = *args.packed;
  Operands<ROWS, PANELS> from;
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) from.w[p] = a.weight + p * a.panel_bytes;
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) from.x[r] = a.rows + r * row.bytes;
  each_segment<PAIRS ? 2 : 1>(a, [&](const Segment& s) __attribute__((always_inline)) {
    vi sum[ROWS][PANELS];
    vf part[ROWS][PANELS];
    const int64_t middle = PAIRS && s.k0 + row.segment < s.k1 ? s.k0 + row.segment : s.k1;
    sum_segment<ROWS, PANELS, INT4, MINS>(from, row, a.ahead, s.index, s.k0, middle, sum);
    if (PAIRS) {
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        const vf row_scale = one_float(from.x[r] + row.scale_at + 4 * s.index);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
          part[r][p] = vmul(vi_to_vf(sum[r][p]), row_scale);
        }
      }
      if (middle < s.k1) {
        sum_segment<ROWS, PANELS, INT4, MINS>(from, row, a.ahead, s.index + 1, middle, s.k1, sum);
        PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
          const vf row_scale = one_float(from.x[r] + row.scale_at + 4 * s.index + 4);
          PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
            part[r][p] = vfma(vi_to_vf(sum[r][p]), row_scale, part[r][p]);
          }
        }
      }
    }
    vf scale[PANELS], min[PANELS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
      const int64_t at = p * a.panel_scales + s.group * 16;
      scale[p] = load_scales(packed, a.scales, at);
      ask_ahead<PANELS>(scales_at(packed, a.scales, at + a.ahead_scales));
      if (MINS) {
        min[p] = load_scales(packed, a.mins, at);
        ask_ahead<PANELS>(scales_at(packed, a.mins, at + a.ahead_scales));
        if (packed.zero_points) min[p] = vmul(vsub(vzero(), scale[p]), min[p]);
      }
    }
    float* to = a.acc;
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      const uint8_t* const of_segment = from.x[r] + 4 * s.index;
      const vf row_scale = PAIRS ? vzero() : one_float(of_segment + row.scale_at);
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        const vf before = vload(to + 16 * p);
        vf value = PAIRS ? vfma(part[r][p], scale[p], before)
                         : vfma(vi_to_vf(sum[r][p]), vmul(scale[p], row_scale), before);
        if (MINS) {
          value = vfma(min[p], one_float(of_segment + row.sum_at), value);
          if (PAIRS && middle < s.k1) {
            value = vfma(min[p], one_float(of_segment + row.sum_at + 4), value);
          }
        }
        vstore(to + 16 * p, value);
      }
      to += a.acc_stride;
    }
  });
}

template <int ROWS, int PANELS, bool INT4>
static void run_rows(const TileArgs& a) {
  const bool pairs = a.row->pairs;
  if (a.mins) {
    pairs ? run_segments<ROWS, PANELS, INT4, true, true>(a)
          : run_segments<ROWS, PANELS, INT4, true, false>(a);
  } else {
    pairs ? run_segments<ROWS, PANELS, INT4, false, true>(a)
          : run_segments<ROWS, PANELS, INT4, false, false>(a);
  }
}

template <int ROWS, int PANELS>
struct Int8IntRows {
  static void run(const TileArgs& a) { run_rows<ROWS, PANELS, false>(a); }
};
template <int ROWS, int PANELS>
struct Int4IntRows {
  static void run(const TileArgs& a) { run_rows<ROWS, PANELS, true>(a); }
};
#endif
}  // namespace

TileKernel int8_rows_kernel(WeightFormat format, int rows, int panels) {
#if PLL_ISA_IS_256
  return int256_kernel(format, rows);
#else
  return format == WeightFormat::INT4 ? KernelTable<Int4IntRows, MAX_INT_ROWS>::find(rows, panels)
                                      : KernelTable<Int8IntRows, MAX_INT_ROWS>::find(rows, panels);
#endif
}

}  // namespace pyllmlite::PLL_NS

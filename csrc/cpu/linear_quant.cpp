// Tile kernels for INT8 and INT4 weights with int8 rows: exact integer dot products.
//
// A segment is summed first, then added to the output with one multiply-add by the group's scale
// (and one by its minimum and the segment's sum of inputs), segments ascending.

#include "linear_segments.h"

namespace pyllmlite::PLL_NS {
namespace {

#if !PLL_ISA_IS_256
template <int ROWS, int PANELS, bool INT4>
struct IntKernel {
  static void run(const TileArgs& a) {
    const RowLayout& row = *a.row;
    const uint8_t* w[PANELS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
    const uint8_t* x[ROWS];
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) x[r] = a.rows + r * row.bytes;
    const int32_t offset = INT4 ? (a.mins ? 0 : 8) : I8_OFFSET;
    each_segment(a, [&](const Segment& s) {
      vi sum[ROWS][PANELS];
      float row_scale[ROWS], row_sum[ROWS];
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        int32_t codes;
        memcpy(&codes, x[r] + row.code_sum_at + 4 * s.index, 4);
        memcpy(&row_scale[r], x[r] + row.scale_at + 4 * s.index, 4);
        memcpy(&row_sum[r], x[r] + row.sum_at + 4 * s.index, 4);
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) sum[r][p] = vi_set1(-offset * codes);
      }
      // 64 bytes hold 4 columns of a panel (INT8) or 8 (INT4).
      constexpr int64_t STEP = INT4 ? 8 : 4;
      for (int64_t k = s.k0; k < s.k1; k += STEP) {
        vi low[PANELS], high[PANELS];
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
          const uint8_t* from = w[p] + k * (64 / STEP);
          const vi raw = vi_load(from);
          ask_ahead<PANELS>(from + a.ahead);
          low[p] = INT4 ? u4_low(raw) : i8_prepare(raw);
          if (INT4) high[p] = u4_high(raw);
        }
        PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          memcpy(&four, x[r] + k, 4);
          const vi value = vi_set1(four);
          PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
            sum[r][p] =
                INT4 ? u4_dot(sum[r][p], low[p], value) : i8_dot(sum[r][p], low[p], value);
          }
        }
        if (INT4) {
          PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
            int32_t four;
            memcpy(&four, x[r] + k + 4, 4);
            const vi value = vi_set1(four);
            PLL_UNROLL for (int p = 0; p < PANELS; ++p)
                sum[r][p] = u4_dot(sum[r][p], high[p], value);
          }
        }
      }
      vf part[ROWS][PANELS];
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) part[r][p] = vi_to_vf(sum[r][p]);
      }
      add_segment<ROWS, PANELS>(a, s, part, row_scale, row_sum);
    });
  }
};

template <int ROWS, int PANELS>
struct Int8IntRows {
  static void run(const TileArgs& a) { IntKernel<ROWS, PANELS, false>::run(a); }
};
template <int ROWS, int PANELS>
struct Int4IntRows {
  static void run(const TileArgs& a) { IntKernel<ROWS, PANELS, true>::run(a); }
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

// Tile kernels for INT8, INT4 and CODEBOOK4 weights with rows of floats (RowType::F32, and BF16
// where the machine has no bf16 dot product): codes become floats in registers.
//
// A segment is summed first, then added to the output with one multiply-add by the group's scale
// (and one by its minimum and the segment's sum of inputs), segments ascending.

#include "linear_decode.h"
#include "linear_segments.h"

namespace pyllmlite::PLL_NS {
namespace {

template <int ROWS, int PANELS, class Decoder>
inline __attribute__((always_inline)) void run_float_rows(const TileArgs& a) {
  const RowLayout& row = *a.row;
  const Decoder decoder(*a.packed);
  const uint8_t* w[PANELS];
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
  const float* x[ROWS];
  PLL_UNROLL for (int r = 0; r < ROWS; ++r)
      x[r] = reinterpret_cast<const float*>(a.rows + r * row.bytes);
  each_segment(a, [&](const Segment& s) {
    vf part[ROWS][PANELS];
    PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) part[r][p] = vzero();
    }
    for (int64_t k = s.k0; k < s.k1; k += Decoder::STEP) {
      vi raw[PANELS];
      vf code[PANELS];
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        const uint8_t* from = w[p] + k * (64 / Decoder::STEP);
        raw[p] = vi_load(from);
        ask_ahead<PANELS>(from + a.ahead);
      }
#define PLL_COLUMN(j)                                                                        \
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) code[p] = decoder.template get<j>(raw[p]); \
  add_column<ROWS, PANELS>(part, code, x, k + (j))
      PLL_COLUMN(0);
      PLL_COLUMN(1);
      PLL_COLUMN(2);
      PLL_COLUMN(3);
      if constexpr (Decoder::STEP == 8) {
        PLL_COLUMN(4);
        PLL_COLUMN(5);
        PLL_COLUMN(6);
        PLL_COLUMN(7);
      }
#undef PLL_COLUMN
    }
    float row_sum[ROWS];
    load_row_sums<ROWS>(a, s, row_sum);
    add_segment<ROWS, PANELS>(a, s, part, row_sum);
  });
}

template <int ROWS, int PANELS>
struct Int8FloatRows {
  static void run(const TileArgs& a) { run_float_rows<ROWS, PANELS, ByteDecoder>(a); }
};
template <int ROWS, int PANELS>
struct Int4FloatRows {
  static void run(const TileArgs& a) {
    if (a.mins) {
      run_float_rows<ROWS, PANELS, NibbleDecoder<false>>(a);
    } else {
      run_float_rows<ROWS, PANELS, NibbleDecoder<true>>(a);
    }
  }
};
template <int ROWS, int PANELS>
struct CodebookFloatRows {
  static void run(const TileArgs& a) { run_float_rows<ROWS, PANELS, CodebookDecoder>(a); }
};

}  // namespace

TileKernel float_rows_kernel(WeightFormat format, int rows, int panels) {
  switch (format) {
    case WeightFormat::INT8: return KernelTable<Int8FloatRows, MAX_ROWS>::find(rows, panels);
    case WeightFormat::INT4: return KernelTable<Int4FloatRows, MAX_ROWS>::find(rows, panels);
    case WeightFormat::CODEBOOK4:
      return KernelTable<CodebookFloatRows, MAX_ROWS>::find(rows, panels);
    default: return nullptr;
  }
}

}  // namespace pyllmlite::PLL_NS

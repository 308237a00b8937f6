// What the parts of the linear op share: the prepared activation rows and the tile kernels.
//
// linear.cpp        the op: sharing of work, epilogue, factory
// linear_rows.cpp   phase 1: an input row normed, scaled, permuted and converted ("record")
// linear_float.cpp  tile kernels of F32 and BF16 weights
// linear_quant.cpp  tile kernels of INT8 and INT4 weights with int8 rows
// linear_int256.cpp  those for AVX2 and AVX-VNNI
// linear_float_rows.cpp  tile kernels of INT8, INT4 and CODEBOOK4 weights with float rows
// linear_bf16_rows.cpp   the same with bf16 rows
// linear_outliers.cpp  LLM.int8(): inputs that stay floats
//
// Every output element is one chain of operations over ascending columns (of groups, for the
// quantized formats), lanes running over weight rows: its bits depend on neither the number of
// rows, nor the tile, nor the thread.
#ifndef PYLLMLITE_CPU_LINEAR_IMPL_H
#define PYLLMLITE_CPU_LINEAR_IMPL_H

#include "simd.h"

#define PLL_UNROLL _Pragma("GCC unroll 16")

namespace pyllmlite::PLL_NS {

enum class RowType : int32_t { F32 = 0, BF16 = 1, INT8 = 2 };

// A prepared row: its k values (F32: float; BF16: bf16, or rounded to it but kept as float where
// the machine has no bf16 dot product; INT8: codes), zeros behind them, then
// per segment a scale (f32, INT8 only), what its products begin with (i32, INT8 only: less its codes
// times what the weight's codes were raised by) and the sum of its values, as rounded (f32).  bf16 that meets codes stands in the order of their pairs: columns
// 0 2 1 3 of every four (see linear_bf16_rows.cpp).  A segment is the run of columns whose dot
// product is scaled at once; it divides the weight's group and the activation group.
struct RowLayout {
  RowType type;
  int64_t k;
  int64_t segment;  // columns; k where the format has no groups
  int64_t num_segments;
  int64_t segments_per_group;             // of the weight
  int64_t segments_per_activation_group;  // INT8 rows
  bool pairs;                             // INT8 rows: a group of the weight is pairs of segments
  int64_t scale_at;                       // bytes from the row's start
  int64_t start_at;
  int64_t sum_at;
  int32_t raised;       // INT8 rows: what was added to the weight's codes
  int64_t outliers_at;  // LLM.int8() only, else 0: see linear_outliers.h
  int64_t bytes;  // an odd multiple of 64, so that rows do not fall on the same cache sets
};

struct LinearState {
  LinearSpec spec;
  RowLayout row;
  int64_t num_panels;
  int64_t panel_bytes;
  int64_t panel_scales;  // elements of scales, and of mins, per panel
  int64_t segment_bytes; // of a panel; 0: not a quantized format
  int64_t k_block;       // columns per pass over a tile
  int64_t max_rows;      // per register tile, for this format
  int64_t local_rows;    // that each thread prepares for itself
  int64_t slice_rows;    // prepared rows that fit a thread's scratch
  int64_t acc_at, rows_at;  // bytes from the scratch's start
  const uint8_t** slices;   // [threads] where each thread's rows stand
  int32_t num_slices;
};

// Writes the record of input row x.  temp: 2 * round_up(k + 16, 16) floats.
void prepare_row(const LinearState& state, const float* x, float* temp, uint8_t* record);

// acc[r][p * 16 + lane] += the dot products of columns [k0, k1), both on segment boundaries.
struct TileArgs {
  const uint8_t* weight;  // first panel
  int64_t panel_bytes;
  const void* scales;  // first panel
  const void* mins;
  int64_t panel_scales;
  int64_t ahead;         // bytes behind a weight's to ask the memory for early
  int64_t ahead_scales;  // likewise, elements of scales and mins
  const PackedLinear* packed;
  const RowLayout* row;
  const uint8_t* rows;  // first record
  int64_t k0, k1;
  float* acc;
  int64_t acc_stride;
};
typedef void (*TileKernel)(const TileArgs&);

// The register tile: up to MAX_ROWS rows by TILE_PANELS panels.  Few rows wait for weights to come
// from memory: F32 and BF16 then keep WIDE_PANELS panels in flight; quantized formats read panel by
// panel, one stream in the memory's order, which fetches ahead twice as fast as several.
#if PLL_ISA >= PLL_ISA_AVX512
static constexpr int MAX_ROWS = 12, TILE_PANELS = 2, WIDE_ROWS = 3, WIDE_PANELS = 4;
static constexpr int MAX_INT_ROWS = 6;  // more spill registers
#elif PLL_ISA >= PLL_ISA_AVX2
static constexpr int MAX_ROWS = 6, TILE_PANELS = 1, WIDE_ROWS = 1, WIDE_PANELS = 4;
static constexpr int MAX_INT_ROWS = PLL_ISA >= PLL_ISA_AVX_VNNI ? 6 : 4;
#else
static constexpr int MAX_ROWS = 2, TILE_PANELS = 1, WIDE_ROWS = 0, WIDE_PANELS = 1;
static constexpr int MAX_INT_ROWS = 2;
#endif
#if PLL_ISA >= PLL_ISA_AVX512_BF16
static constexpr int MAX_NIBBLE_ROWS = 6;  // 4-bit codes with bf16 rows: outputs beside the sums
#else
static constexpr int MAX_NIBBLE_ROWS = MAX_ROWS;
#endif
static constexpr int STREAM_ROWS = 4;         // of a quantized format, read panel by panel
static constexpr int64_t STREAM_AHEAD = 4096;  // bytes

// panels: 1, TILE_PANELS, or WIDE_PANELS where rows <= WIDE_ROWS.  Int8 rows: rows <= MAX_INT_ROWS.
TileKernel float_kernel(WeightFormat format, int rows, int panels);
TileKernel int8_rows_kernel(WeightFormat format, int rows, int panels);
TileKernel float_rows_kernel(WeightFormat format, int rows, int panels);
TileKernel bf16_rows_kernel(WeightFormat format, int rows, int panels);
#if PLL_ISA_IS_256
TileKernel int256_kernel(WeightFormat format, int rows);  // one panel, int8 rows
#endif

// Table of Kernel<ROWS, PANELS>::run for rows 1..ROWS, for the factories above.
template <template <int, int> class Kernel, int ROWS>
struct KernelTable {
  static TileKernel find(int rows, int panels) {
    if (rows != ROWS) return KernelTable<Kernel, ROWS - 1>::find(rows, panels);
    if constexpr (ROWS <= WIDE_ROWS) {
      if (panels == WIDE_PANELS) return Kernel<ROWS, WIDE_PANELS>::run;
    }
    if constexpr (TILE_PANELS > 1) {
      if (panels == TILE_PANELS) return Kernel<ROWS, TILE_PANELS>::run;
    }
    return Kernel<ROWS, 1>::run;
  }
};
template <template <int, int> class Kernel>
struct KernelTable<Kernel, 0> {
  static TileKernel find(int, int) { return nullptr; }
};

// 16 scales or mins.
PLL_INLINE vf load_scales(const PackedLinear& w, const void* table, int64_t at) {
  return w.wide_scales ? vload(static_cast<const float*>(table) + at)
                       : vload_f16(static_cast<const uint16_t*>(table) + at);
}
PLL_INLINE const void* scales_at(const PackedLinear& w, const void* table, int64_t at) {
  return table ? static_cast<const char*>(table) + at * (w.wide_scales ? 4 : 2) : nullptr;
}

// Where the rows of a tile stand: a base for every four rows and offsets that they share.  Twelve
// offsets of their own would not fit the registers.
template <int ROWS>
struct RowPointers {
  const uint8_t* base[(ROWS + 3) / 4];
  int64_t stride, stride3;

  explicit inline __attribute__((always_inline)) RowPointers(const TileArgs& a)
      : stride(a.row->bytes), stride3(3 * a.row->bytes) {
    asm("" : "+r"(stride3));  // or the compiler makes offsets of its own again
    PLL_UNROLL for (int i = 0; i < (ROWS + 3) / 4; ++i) {
      base[i] = a.rows + 4 * i * stride;
      asm("" : "+r"(base[i]));
    }
  }
  // Byte `at` of row R.
  inline __attribute__((always_inline)) const uint8_t* get(int r, int64_t at) const {
    return base[r / 4] + (r % 4 == 3 ? stride3 : r % 4 * stride) + at;
  }
};

PLL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
PLL_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace pyllmlite::PLL_NS


#endif

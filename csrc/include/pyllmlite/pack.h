// Offline packing of weight matrices into the order that the linear kernels read.
//
// Rows stand in panels of 16 (n padded up with zeros), k runs inside a panel:
//   F32   [n/16][k][16] float
//   BF16  [n/16][k/2][16][2] (k padded to even)
//   INT8  [n/16][k/4][16][4] (k padded to 4 with zero codes)
//   INT4  [n/16][k/8][16][4 bytes]: byte j of lane r holds code k=8i+j in its low nibble and
//         k=8i+4+j in its high one (k padded to 8; a group always starts on a multiple of 8)
//   CODEBOOK4  as INT4
// scales and mins: f16 or f32 [n/16][groups][16].  One layout for every instruction set, so that a
// packed file moves between machines.
#ifndef PYLLMLITE_PACK_H
#define PYLLMLITE_PACK_H

#include <cstddef>
#include <cstdint>

#include "pyllmlite/export.h"
#include "pyllmlite/ops.h"

namespace pyllmlite {

// Bytes of data, and elements of scales (and of mins), for a matrix.  Gated: each half is padded
// to panels of its own.
struct PackedSize {
  size_t data_bytes;
  size_t num_scales;
};
PLL_API PackedSize packed_size(WeightFormat format, int64_t n, int64_t k, int64_t group_size,
                               bool gated = false);

// Null where the shape can be packed, else a line that says why not: a group size must be a
// multiple of 8 (INT4, CODEBOOK4) or 4 (INT8), or 0, or at least k; gated needs an even n.
PLL_API const char* pack_error(WeightFormat format, int64_t n, int64_t k, int64_t group_size,
                               bool gated);

// values: row-major [n, k]: float (F32, BF16: rounded to nearest even), int8_t (INT8) or
// uint8_t 0..15 (INT4, CODEBOOK4).  scales, mins: f16 bits, or f32 with wide_scales, row-major
// [n, groups], mins may be null.
// gated: rows 0..n/2-1 are gate, the rest up; they are interleaved in blocks of 16.
// The shape must pass pack_error.  Threads of the pool are not used: callers pack matrices side
// by side.
PLL_API void pack_linear(WeightFormat format, int64_t n, int64_t k, int64_t group_size, bool gated,
                         const void* values, const void* scales, const void* mins,
                         void* data_out, void* scales_out, void* mins_out,
                         bool wide_scales = false);

// Only rows first .. first+count-1 (before gating): values, scales and mins hold those rows, n is
// the whole matrix's.  The buffers of an unfinished matrix must start zeroed (padding is zeros).
PLL_API void pack_rows(WeightFormat format, int64_t n, int64_t k, int64_t group_size, bool gated,
                       int64_t first, int64_t count, const void* values, const void* scales,
                       const void* mins, void* data_out, void* scales_out, void* mins_out,
                       bool wide_scales = false);

// Row `row` (before gating) back as floats [k]: the embedding's gather, and the reference.
PLL_API void unpack_row(const PackedLinear& weight, int64_t row, float* out, bool gated = false);

}  // namespace pyllmlite

#endif

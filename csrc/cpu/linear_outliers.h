// LLM.int8() (Dettmers et al. 2022): inputs whose magnitude exceeds a threshold are taken out of
// their row before it is quantized, and multiplied as floats with the weight's own values.
//
// They are found row by row, so that no row feels another's.  A record keeps them behind its codes:
// a count, then (index, value) pairs, columns ascending; where more than half of the columns are
// outliers, one float a column instead, zero for the others, in the same memory.  Both sum in the
// same order, and a zero adds nothing: the bits do not depend on which it is.
#ifndef PYLLMLITE_CPU_LINEAR_OUTLIERS_H
#define PYLLMLITE_CPU_LINEAR_OUTLIERS_H

#include "linear_impl.h"

namespace pyllmlite::PLL_NS {

// Bytes of a record that hold the outliers of k columns.
int64_t outlier_bytes(int64_t k);

// Moves the outliers of y [k] to the record; zeros stand in their place.
void take_outliers(const LinearState& state, float* y, uint8_t* record);

// acc[r][p * 16 + lane] += what the outliers of `num_rows` records add, for `panels` panels from
// `first`.
void add_outliers(const LinearState& state, const uint8_t* rows, int64_t num_rows, int64_t first,
                  int64_t panels, float* acc, int64_t acc_stride);

}  // namespace pyllmlite::PLL_NS

#endif

// What tile kernels over groups of columns share: the walk over segments, and how one is added.
#ifndef PYLLMLITE_CPU_LINEAR_SEGMENTS_H
#define PYLLMLITE_CPU_LINEAR_SEGMENTS_H

#include "linear_impl.h"
#include "simd_int.h"

namespace pyllmlite::PLL_NS {

// Asks for weights, scales and minimums that come later: into the first cache where panels are
// streamed, into the second where other rows of the tile come before they are used.
template <int PANELS>
static inline __attribute__((always_inline)) void ask_ahead(const void* p) {
  if (PANELS == 1) {
    prefetch(p);
  } else {
    prefetch_l2(p);
  }
}

struct Segment {
  int64_t index;
  int64_t k0, k1;
  int64_t group;
};

// Calls body(segment) for the segments of [k0, k1), N at a time, which a group holds whole: index
// and k0 are then the first one's, k1 the last one's.
template <int N, class Body>
static inline __attribute__((always_inline)) void each_segment(const TileArgs& a, Body body) {
  const RowLayout& row = *a.row;
  const int64_t columns = N * row.segment;
  int64_t s = a.k0 / row.segment;
  int64_t group = s / row.segments_per_group;
  int64_t left = row.segments_per_group - s % row.segments_per_group;
  for (int64_t k = a.k0; k < a.k1; k += columns, s += N) {
    const int64_t end = k + columns < row.k ? k + columns : row.k;
    body(Segment{s, k, end, group});
    if ((left -= N) <= 0) {
      ++group;
      left = row.segments_per_group;
    }
  }
}
template <class Body>
static inline __attribute__((always_inline)) void each_segment(const TileArgs& a, Body body) {
  each_segment<1>(a, body);
}

// Each row's sum of its values in a segment.
template <int ROWS>
static inline __attribute__((always_inline)) void load_row_sums(const TileArgs& a, const Segment& s,
                                                                float (&sums)[ROWS]) {
  PLL_UNROLL for (int r = 0; r < ROWS; ++r)
      memcpy(&sums[r], a.rows + r * a.row->bytes + a.row->sum_at + 4 * s.index, 4);
}

// acc += scale * part (+ min * sum), for float rows.
template <int ROWS, int PANELS>
static inline __attribute__((always_inline)) void add_segment(
    const TileArgs& a, const Segment& s, const vf (&part)[ROWS][PANELS], const float* row_sum) {
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
    const int64_t at = p * a.panel_scales + s.group * 16;
    const vf scale = load_scales(*a.packed, a.scales, at);
    ask_ahead<PANELS>(scales_at(*a.packed, a.scales, at + a.ahead_scales));
    if (a.mins) {
      ask_ahead<PANELS>(scales_at(*a.packed, a.mins, at + a.ahead_scales));
      vf min = load_scales(*a.packed, a.mins, at);
      if (a.packed->zero_points) min = vmul(vsub(vzero(), scale), min);
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        float* to = a.acc + r * a.acc_stride + p * 16;
        vstore(to, vfma(min, vset1(row_sum[r]), vfma(part[r][p], scale, vload(to))));
      }
    } else {
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        float* to = a.acc + r * a.acc_stride + p * 16;
        vstore(to, vfma(part[r][p], scale, vload(to)));
      }
    }
  }
}

// part[r][p] += x[r][k] * code for one column.
template <int ROWS, int PANELS>
static inline __attribute__((always_inline)) void add_column(
    vf (&part)[ROWS][PANELS], const vf (&code)[PANELS], const float* const (&x)[ROWS],
    int64_t k) {
  PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
    const vf value = vset1(x[r][k]);
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) part[r][p] = vfma(value, code[p], part[r][p]);
  }
}

}  // namespace pyllmlite::PLL_NS

#endif

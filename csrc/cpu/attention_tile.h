// The arithmetic of attention: some rows (queries of one KV head) against 256 keys.
//
// Keys are cut at fixed absolute positions into splits of 256, splits into tiles of 16.  For one
// row a split yields the maximum m of its visible scores, l = sum of exp(score - m) and
// a = sum of exp(score - m) * v, keys ascending; splits are then joined ascending (online softmax,
// Milakov & Gimelshein 2018; the split of the context as in Flash-Decoding, Dao et al. 2023).
// What a row computes is thus a function of its position alone.  Which rows share a load of K
// or V, and how many tiles are in flight, only changes the order between independent lanes.
//
// Memory behind a key that a row does not see may hold anything, NaN included: scores there are
// replaced, never multiplied away, and V rows there are not touched on the row's behalf.
#ifndef PYLLMLITE_CPU_ATTENTION_TILE_H
#define PYLLMLITE_CPU_ATTENTION_TILE_H

#include "cpu/simd.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kTile = 16;
constexpr int32_t kSplit = 256;
constexpr int32_t kSplitTiles = kSplit / kTile;

// Rows that share loads, and vectors in flight per row: their product is the number of
// accumulators, which must fit the registers and hide the latency of a multiply-add.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int32_t kRows = 8;
constexpr int vectors_for(int rows) { return rows <= 4 ? 4 : 2; }
#elif PLL_ISA == PLL_ISA_AVX2
constexpr int32_t kRows = 4;
constexpr int vectors_for(int rows) { return rows == 1 ? 4 : (rows == 2 ? 2 : 1); }
#else
constexpr int32_t kRows = 2;
constexpr int vectors_for(int) { return 1; }
#endif

PLL_INLINE vf load_kv(const float* p) { return vload(p); }
PLL_INLINE vf load_kv(const uint16_t* p) { return vload_bf16(p); }
PLL_INLINE vf load_kv_n(const float* p, int32_t n) { return vload_n(p, n); }
PLL_INLINE vf load_kv_n(const uint16_t* p, int32_t n) {
  uint16_t padded[16] = {};
  memcpy(padded, p, n * sizeof(uint16_t));
  return vload_bf16(padded);
}

// Where a split's tiles lie; entries outside of the range asked for are not set.
template <typename T>
struct SplitView {
  const T* k[kSplitTiles];  // [head_dim, stride k_stride]
  const T* v[kSplitTiles];  // [16, head_dim]
};

// Keys [low, high) of the split, in 0 .. 256.
struct Range {
  int32_t low, high;
};

// scores[r][16 t ..] = q_r . k for N tiles.  q: [head_dim][R], already scaled.  A tile of V has
// as many bytes as one of K, so every load of keys fetches its like of the values ahead: blocks
// are scattered, which the hardware does not foresee.
template <typename T, int R, int N>
PLL_INLINE void score_tiles(const T* const* k, const T* const* v, int64_t k_stride, const float* q,
                            int32_t head_dim, float* scores) {
  vf sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = vzero();
  }
  for (int32_t d = 0; d < head_dim; ++d) {
    vf keys[N];
    for (int j = 0; j < N; ++j) {
      keys[j] = load_kv(k[j] + d * k_stride);
      __builtin_prefetch(v[j] + d * 16);
    }
    for (int r = 0; r < R; ++r) {
      const vf x = vset1(q[d * R + r]);
      for (int j = 0; j < N; ++j) sums[r][j] = vfma(x, keys[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) vstore(scores + r * kSplit + j * kTile, sums[r][j]);
  }
}

template <typename T, int R>
void score_split(const SplitView<T>& view, int64_t k_stride, const float* q, int32_t head_dim,
                 int32_t first, int32_t last, float* scores) {
  constexpr int N = vectors_for(R);
  int32_t t = first;
  for (; t + N <= last; t += N) {
    score_tiles<T, R, N>(view.k + t, view.v + t, k_stride, q, head_dim, scores + t * kTile);
  }
  for (; t < last; ++t) {
    score_tiles<T, R, 1>(view.k + t, view.v + t, k_stride, q, head_dim, scores + t * kTile);
  }
}

// What turns a row's dot products into scores.
struct ScoreMap {
  float softcap;  // 0: none
  float slope;    // ALiBi
  float offset;   // first key of the split minus the query's position
};

// Scores of one row to weights exp(score - m), in place, over the tiles that `range` touches.
PLL_INLINE void soften(float* scores, Range range, const ScoreMap& map, float* m_out,
                       float* l_out) {
  alignas(64) static const float lanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                              8, 9, 10, 11, 12, 13, 14, 15};
  const vf lane = vload(lanes);
  const vf hidden = vset1(-INFINITY);
  const int32_t begin = range.low & ~(kTile - 1);
  vf high = hidden;
  for (int32_t t = begin; t < range.high; t += kTile) {
    vf s = vload(scores + t);
    if (map.softcap > 0) {
      s = vmul(vset1(map.softcap), vtanh(vdiv(s, vset1(map.softcap))));
    }
    if (map.slope != 0) {
      s = vadd(s, vmul(vset1(map.slope), vadd(vset1(map.offset + static_cast<float>(t)), lane)));
    }
    if (t < range.low) {
      s = vselect_gt(lane, vset1(static_cast<float>(range.low - t) - 0.5f), s, hidden);
    }
    if (t + kTile > range.high) {
      s = vselect_gt(vset1(static_cast<float>(range.high - t) - 0.5f), lane, s, hidden);
    }
    vstore(scores + t, s);
    high = vmax(high, s);
  }
  const float m = vreduce_max(high);
  vf sum = vzero();
  for (int32_t t = begin; t < range.high; t += kTile) {
    const vf p = vexp(vsub(vload(scores + t), vset1(m)));
    vstore(scores + t, p);
    sum = vadd(sum, p);
  }
  *m_out = m;
  *l_out = vreduce_add(sum);
}

// acc[r][16 j ..] += sum over keys [range) of p_r * v, for N vectors of v's columns (`lanes` of
// the last one's 16 if PARTIAL).
template <typename T, int R, int N, bool PARTIAL>
PLL_INLINE void weigh_columns(const T* const* v, int32_t head_dim, int32_t column, int32_t lanes,
                              const float* p, Range range, float* acc, int64_t acc_stride) {
  vf sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = vload(acc + r * acc_stride + column + j * 16);
  }
  for (int32_t key = range.low; key < range.high;) {
    const int32_t tile = key / kTile;
    const int32_t stop = (tile + 1) * kTile < range.high ? (tile + 1) * kTile : range.high;
    const T* row = v[tile] + int64_t(key - tile * kTile) * head_dim + column;
    for (; key < stop; ++key, row += head_dim) {
      vf values[N];
      for (int j = 0; j < N; ++j) {
        values[j] = PARTIAL ? load_kv_n(row + j * 16, lanes) : load_kv(row + j * 16);
      }
      for (int r = 0; r < R; ++r) {
        const vf x = vset1(p[r * kSplit + key]);
        for (int j = 0; j < N; ++j) sums[r][j] = vfma(x, values[j], sums[r][j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) vstore(acc + r * acc_stride + column + j * 16, sums[r][j]);
  }
}

template <typename T, int R>
void weigh_values(const SplitView<T>& view, int32_t head_dim, const float* p, Range range,
                  float* acc, int64_t acc_stride) {
  constexpr int N = vectors_for(R);
  int32_t column = 0;
  for (; column + 16 * N <= head_dim; column += 16 * N) {
    weigh_columns<T, R, N, false>(view.v, head_dim, column, 16, p, range, acc, acc_stride);
  }
  for (; column + 16 <= head_dim; column += 16) {
    weigh_columns<T, R, 1, false>(view.v, head_dim, column, 16, p, range, acc, acc_stride);
  }
  if (column < head_dim) {
    weigh_columns<T, R, 1, true>(view.v, head_dim, column, head_dim - column, p, range, acc,
                                 acc_stride);
  }
}

// One row's state: a[0 .. padded head_dim) behind m and l.
struct RowState {
  float* m;
  float* l;
  float* a;
};

PLL_INLINE float exp_of(float x) { return vreduce_max(vexp(vset1(x))); }

// Joins a later split's result to the row's.  A row that has seen no split has l < 0.
PLL_INLINE void join(const RowState& row, float m, float l, const float* a, int32_t padded) {
  if (*row.l < 0) {
    *row.m = m;
    *row.l = l;
    memcpy(row.a, a, padded * sizeof(float));
    return;
  }
  const float top = *row.m > m ? *row.m : m;
  const float keep = exp_of(*row.m - top), take = exp_of(m - top);
  const vf vkeep = vset1(keep), vtake = vset1(take);
  for (int32_t d = 0; d < padded; d += 16) {
    vstore(row.a + d, vfma(vload(row.a + d), vkeep, vmul(vload(a + d), vtake)));
  }
  *row.l = *row.l * keep + l * take;
  *row.m = top;
}

// Everything of one split for R rows: weights into `scores` [R][256], then a [R][padded], and m
// and l of the rows whose range is not empty.
template <typename T, int R>
void attend_rows(const SplitView<T>& view, int64_t k_stride, int32_t head_dim, int32_t padded,
                 const float* q, const Range* ranges, const ScoreMap* maps, float* scores,
                 float* m, float* l, float* a) {
  Range touched{kSplit, 0}, shared{0, kSplit};
  for (int r = 0; r < R; ++r) {
    if (ranges[r].low < ranges[r].high) {
      touched.low = ranges[r].low < touched.low ? ranges[r].low : touched.low;
      touched.high = ranges[r].high > touched.high ? ranges[r].high : touched.high;
    }
    shared.low = ranges[r].low > shared.low ? ranges[r].low : shared.low;
    shared.high = ranges[r].high < shared.high ? ranges[r].high : shared.high;
  }
  if (touched.low >= touched.high) return;
  score_split<T, R>(view, k_stride, q, head_dim, touched.low / kTile,
                    (touched.high + kTile - 1) / kTile, scores);
  for (int r = 0; r < R; ++r) {
    if (ranges[r].low >= ranges[r].high) continue;
    soften(scores + r * kSplit, ranges[r], maps[r], m + r, l + r);
  }
  memset(a, 0, sizeof(float) * R * padded);
  // Keys that all rows see share their loads; those before and after belong to single rows.
  const bool any_shared = shared.low < shared.high;
  for (int r = 0; r < R; ++r) {
    const Range before{ranges[r].low, any_shared ? shared.low : ranges[r].high};
    if (before.low < before.high) {
      weigh_values<T, 1>(view, head_dim, scores + r * kSplit, before, a + r * padded, padded);
    }
  }
  if (any_shared) weigh_values<T, R>(view, head_dim, scores, shared, a, padded);
  for (int r = 0; r < R && any_shared; ++r) {
    const Range after{shared.high, ranges[r].high};
    if (after.low < after.high) {
      weigh_values<T, 1>(view, head_dim, scores + r * kSplit, after, a + r * padded, padded);
    }
  }
}

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif

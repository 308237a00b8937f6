// The arithmetic of attention: some rows (queries of one KV head) against 256 keys.
//
// Keys are cut at fixed absolute positions into splits of 256, splits into tiles of 16.  For one
// row a split yields the maximum m of its visible scores, l = sum of exp(score - m) and
// a = sum of exp(score - m) * v, each in a fixed order; splits are then joined ascending (online
// softmax, Milakov & Gimelshein 2018; the split of the context as in Flash-Decoding, Dao et al.
// 2023).
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

// The value sum of a row runs in this many chains, tile t in chain t % kChains, added up in
// ascending order: a small head has too few columns to hide the latency of a multiply-add.
constexpr int kChains = 4;

// Rows that share loads, and vectors in flight per row: their product is the number of
// accumulators, which must fit the registers and hide that latency.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int32_t kRows = 8;
constexpr int kAccumulators = 16;
constexpr int vectors_for(int rows) { return rows <= 4 ? 4 : 2; }
#elif PLL_ISA == PLL_ISA_AVX2
constexpr int32_t kRows = 4;
constexpr int kAccumulators = 4;
constexpr int vectors_for(int rows) { return rows == 1 ? 4 : (rows == 2 ? 2 : 1); }
#else
constexpr int32_t kRows = 2;
constexpr int kAccumulators = 2;
constexpr int vectors_for(int) { return 1; }
#endif
// Chains that run at the same time; the others follow.
constexpr int chains_for(int rows, int vectors) {
  return rows * vectors * kChains <= kAccumulators ? kChains
                                                   : (rows * vectors * 2 <= kAccumulators ? 2 : 1);
}

PLL_INLINE vf load_kv(const float* p) { return vload(p); }
PLL_INLINE vf load_kv(const uint16_t* p) { return vload_bf16(p); }
PLL_INLINE vf load_kv_n(const float* p, int32_t n) { return vload_n(p, n); }
PLL_INLINE vf load_kv_n(const uint16_t* p, int32_t n) {
  uint16_t padded[16] = {};
  memcpy(padded, p, n * sizeof(uint16_t));
  return vload_bf16(padded);
}

// Where a split's tiles of one KV head lie; those outside of the range asked for are not set.
template <typename T>
struct SplitView {
  const T* k[kSplitTiles];  // [head_dim, stride k_stride]
  const T* v[kSplitTiles];  // [16, head_dim]
  int64_t k_stride;
  int32_t head_dim;
};

// Keys [low, high) of the split, in 0 .. 256.
struct Range {
  int32_t low, high;
};

// Bytes of a key from which on values are fetched ahead.  Blocks are scattered, which the hardware
// does not foresee; but in a small one it has its own prefetch going before ours would help.
constexpr int32_t kFetchBytes = 128;

// scores[r][16 t ..] = q_r . k for N tiles.  q: [head_dim][R], already scaled.  FETCH: a tile of V
// has as many bytes as one of K, so every load of keys fetches its like of the values.
template <typename T, int R, int N, bool FETCH>
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
      if (FETCH) __builtin_prefetch(v[j] + d * 16);
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

template <typename T, int R, bool FETCH>
PLL_INLINE void score_range(const SplitView<T>& view, const float* q, int32_t first, int32_t last,
                            float* scores) {
  constexpr int N = vectors_for(R);
  int32_t t = first;
  for (; t + N <= last; t += N) {
    score_tiles<T, R, N, FETCH>(view.k + t, view.v + t, view.k_stride, q, view.head_dim,
                                scores + t * kTile);
  }
  if (N > 2 && t + 2 <= last) {
    score_tiles<T, R, 2, FETCH>(view.k + t, view.v + t, view.k_stride, q, view.head_dim,
                                scores + t * kTile);
    t += 2;
  }
  for (; t < last; ++t) {
    score_tiles<T, R, 1, FETCH>(view.k + t, view.v + t, view.k_stride, q, view.head_dim,
                                scores + t * kTile);
  }
}

// Scores of the tiles that `touched` lies in, [R][kSplit].
template <typename T, int R>
void score_split(const SplitView<T>& view, const float* q, Range touched, float* scores) {
  const int32_t first = touched.low / kTile, last = (touched.high + kTile - 1) / kTile;
  if (view.head_dim * int32_t(sizeof(T)) >= kFetchBytes) {
    score_range<T, R, true>(view, q, first, last, scores);
  } else {
    score_range<T, R, false>(view, q, first, last, scores);
  }
}

// What turns a row's dot products into scores.  Scores are kept times log2(e), which the queries
// carry already unless there is a soft-cap: powers of two are cheaper than powers of e.
constexpr float kLog2E = 1.44269504088896f;
struct ScoreMap {
  float softcap;  // 0: none
  float slope;    // ALiBi's, times log2(e)
  float offset;   // first key of the split minus the query's position
};

// 2^x for x <= 0, within 1 ulp; -infinity is 0, NaN stays.  (Coefficients: Remez, on [-1/2, 1/2],
// with p(0) = 1.)
PLL_INLINE vf vexp2_weight(vf x) {
  x = vmax(vset1(-160.0f), x);
  const vf n = vround(x);
  const vf r = vsub(x, n);
  vf p = vset1(1.5594677e-4f);
  p = vfma(p, r, vset1(1.3406643e-3f));
  p = vfma(p, r, vset1(9.6176928e-3f));
  p = vfma(p, r, vset1(5.5503104e-2f));
  p = vfma(p, r, vset1(2.4022652e-1f));
  p = vfma(p, r, vset1(6.9314724e-1f));
  p = vfma(p, r, vset1(1.0f));
  return vscale2(p, n);
}

alignas(64) constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// -infinity in the lanes of the tile at key t that lie outside of the range.
PLL_INLINE vf hide(vf s, int32_t t, Range range) {
  const vf lane = vload(kLanes), hidden = vset1(-INFINITY);
  if (t < range.low) {
    s = vselect_gt(lane, vset1(static_cast<float>(range.low - t) - 0.5f), s, hidden);
  }
  if (t + kTile > range.high) {
    s = vselect_gt(vset1(static_cast<float>(range.high - t) - 0.5f), lane, s, hidden);
  }
  return s;
}

// Dot products of the tile at key t to scores.
PLL_INLINE vf map_scores(vf s, int32_t t, const ScoreMap& map) {
  if (map.softcap > 0) {
    s = vmul(vset1(map.softcap * kLog2E), vtanh(vdiv(s, vset1(map.softcap))));
  }
  if (map.slope != 0) {
    const vf distance = vadd(vset1(map.offset + static_cast<float>(t)), vload(kLanes));
    s = vadd(s, vmul(vset1(map.slope), distance));
  }
  return s;
}

// Scores of one row to weights 2^(score - m), in place, over the tiles that `range` touches.
PLL_INLINE void soften(float* scores, Range range, const ScoreMap& map, float* m_out,
                       float* l_out) {
  const int32_t begin = range.low & ~(kTile - 1);
  const int32_t inner = (range.low + kTile - 1) & ~(kTile - 1), end = range.high & ~(kTile - 1);
  const bool mapped = map.softcap > 0 || map.slope != 0;
  vf high = vset1(-INFINITY);
  for (int32_t t = begin; t < range.high; t += kTile) {
    vf s = vload(scores + t);
    if (mapped) s = map_scores(s, t, map);
    if (t < inner || t >= end) s = hide(s, t, range);
    if (mapped || t < inner || t >= end) vstore(scores + t, s);
    high = vmax(high, s);
  }
  const float m = vreduce_max(high);
  vf sum = vzero();
  for (int32_t t = begin; t < range.high; t += kTile) {
    const vf p = vexp2_weight(vsub(vload(scores + t), vset1(m)));
    vstore(scores + t, p);
    sum = vadd(sum, p);
  }
  *m_out = m;
  *l_out = vreduce_add(sum);
}

// What the keys of one chunk of rows weigh.
struct Weights {
  const float* p;       // [rows, kSplit]
  const Range* ranges;  // of each row
  Range touched;        // that any row sees
  Range shared;         // that all rows see
};

// sums[r][j] += p_r * v over the keys of tile t, for N vectors of v's columns (`lanes` of the
// last one's 16 if PARTIAL).  EACH: rows see different keys of the tile.
template <typename T, int R, int N, bool PARTIAL, bool EACH>
PLL_INLINE void weigh_tile(const T* v, int32_t head_dim, int32_t column, int32_t lanes, int32_t t,
                           const Weights& w, vf (&sums)[R][N]) {
  const int32_t low = w.touched.low > t * kTile ? w.touched.low : t * kTile;
  const int32_t high = w.touched.high < (t + 1) * kTile ? w.touched.high : (t + 1) * kTile;
  const T* row = v + int64_t(low - t * kTile) * head_dim + column;
  for (int32_t key = low; key < high; ++key, row += head_dim) {
    vf values[N];
    for (int j = 0; j < N; ++j) {
      values[j] = PARTIAL ? load_kv_n(row + j * 16, lanes) : load_kv(row + j * 16);
    }
    for (int r = 0; r < R; ++r) {
      if (EACH && (key < w.ranges[r].low || key >= w.ranges[r].high)) continue;
      const vf x = vset1(w.p[r * kSplit + key]);
      for (int j = 0; j < N; ++j) sums[r][j] = vfma(x, values[j], sums[r][j]);
    }
  }
}

// acc[r][16 j ..] = sum over a row's keys of p_r * v, for N vectors of v's columns; F chains at
// a time.
template <typename T, int R, int N, int F, bool PARTIAL>
PLL_INLINE void weigh_columns(const T* const* v, int32_t head_dim, int32_t column, int32_t lanes,
                              const Weights& w, float* acc, int64_t acc_stride) {
  const bool same = w.touched.low == w.shared.low && w.touched.high == w.shared.high;
  const int32_t last = (w.touched.high + kTile - 1) / kTile;
  for (int chain = 0; chain < kChains; chain += F) {
    vf sums[F][R][N];
    for (int f = 0; f < F; ++f) {
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < N; ++j) sums[f][r][j] = vzero();
      }
    }
    for (int32_t first = w.touched.low / kTile / kChains * kChains; first < last;
         first += kChains) {
      const int32_t t = first + chain;
      if (t * kTile >= w.shared.low && (t + F) * kTile <= w.shared.high) {
        // Whole tiles that all rows see, side by side.
        for (int32_t key = 0; key < kTile; ++key) {
          for (int f = 0; f < F; ++f) {
            const T* row = v[t + f] + int64_t(key) * head_dim + column;
            vf values[N];
            for (int j = 0; j < N; ++j) {
              values[j] = PARTIAL ? load_kv_n(row + j * 16, lanes) : load_kv(row + j * 16);
            }
            for (int r = 0; r < R; ++r) {
              const vf x = vset1(w.p[r * kSplit + (t + f) * kTile + key]);
              for (int j = 0; j < N; ++j) sums[f][r][j] = vfma(x, values[j], sums[f][r][j]);
            }
          }
        }
        continue;
      }
      for (int f = 0; f < F; ++f) {
        if ((t + f) * kTile >= w.touched.high || (t + f + 1) * kTile <= w.touched.low) continue;
        if (same) {
          weigh_tile<T, R, N, PARTIAL, false>(v[t + f], head_dim, column, lanes, t + f, w,
                                              sums[f]);
        } else {
          weigh_tile<T, R, N, PARTIAL, true>(v[t + f], head_dim, column, lanes, t + f, w,
                                             sums[f]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        float* to = acc + r * acc_stride + column + j * 16;
        vf total = chain == 0 ? sums[0][r][j] : vadd(vload(to), sums[0][r][j]);
        for (int f = 1; f < F; ++f) total = vadd(total, sums[f][r][j]);
        vstore(to, total);
      }
    }
  }
}

// acc[r] = sum of p_r * v, [R][acc_stride].
template <typename T, int R>
void weigh_values(const SplitView<T>& view, const Weights& w, float* acc, int64_t acc_stride) {
  const int32_t head_dim = view.head_dim;
  constexpr int N = vectors_for(R), F = chains_for(R, N), F1 = chains_for(R, 1);
  int32_t column = 0;
  for (; column + 16 * N <= head_dim; column += 16 * N) {
    weigh_columns<T, R, N, F, false>(view.v, head_dim, column, 16, w, acc, acc_stride);
  }
  for (; column + 16 <= head_dim; column += 16) {
    weigh_columns<T, R, 1, F1, false>(view.v, head_dim, column, 16, w, acc, acc_stride);
  }
  if (column < head_dim) {
    weigh_columns<T, R, 1, F1, true>(view.v, head_dim, column, head_dim - column, w, acc,
                                     acc_stride);
  }
}

// One row's state: a[0 .. padded head_dim) behind m and l.
struct RowState {
  float* m;
  float* l;
  float* a;
};

PLL_INLINE float exp2_of(float x) { return vreduce_max(vexp2_weight(vset1(x))); }

// Joins a later split's result to the row's.  A row that has seen no split has l < 0.
PLL_INLINE void join(const RowState& row, float m, float l, const float* a, int32_t padded) {
  if (*row.l < 0) {
    *row.m = m;
    *row.l = l;
    memcpy(row.a, a, padded * sizeof(float));
    return;
  }
  const float top = *row.m > m ? *row.m : m;
  const float keep = exp2_of(*row.m - top), take = exp2_of(m - top);
  const vf vkeep = vset1(keep), vtake = vset1(take);
  for (int32_t d = 0; d < padded; d += 16) {
    vstore(row.a + d, vfma(vload(row.a + d), vkeep, vmul(vload(a + d), vtake)));
  }
  *row.l = *row.l * keep + l * take;
  *row.m = top;
}

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif

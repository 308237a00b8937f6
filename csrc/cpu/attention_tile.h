// The arithmetic of attention: some rows (queries of one KV head) against 256 keys.
//
// Keys are cut at fixed absolute positions into splits of 256, splits into tiles of 16.  For one
// row a split yields the maximum m of its visible scores, l = sum of exp(score - m) and
// a = sum of exp(score - m) * v, each in a fixed order; splits are then joined ascending (online
// softmax, Milakov & Gimelshein 2018; the split of the context as in Flash-Decoding, Dao et al.
// 2023).  What a row computes is thus a function of its position alone.  Which rows share a load
// of K or V, and how many tiles are in flight, only changes the order between independent lanes.
//
// Memory behind a key that a row does not see may hold anything, NaN included: scores there are
// replaced, never multiplied away, and V there is not multiplied on the row's behalf.
//
// This file has what all storage formats share: softmax and joining.  The products are in
// attention_float.h and attention_bf16.h.
#ifndef PYLLMLITE_CPU_ATTENTION_TILE_H
#define PYLLMLITE_CPU_ATTENTION_TILE_H

#include "cpu/simd.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kTile = 16;
constexpr int32_t kSplit = 256;
constexpr int32_t kSplitTiles = kSplit / kTile;

// Rows that share loads: a chunk has at most so many.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int32_t kRows = 8;
#elif PLL_ISA >= PLL_ISA_AVX2
constexpr int32_t kRows = 4;
#else
constexpr int32_t kRows = 2;
#endif

// Keys [low, high) of the split, in 0 .. 256.
struct Range {
  int32_t low, high;
};

// Where a split's tiles of one KV head lie; those outside of the range asked for are not set.
template <typename T>
struct SplitView {
  const T* k[kSplitTiles];  // + offset: [head_dim, stride k_stride]
  const T* v[kSplitTiles];  // + offset: [16, head_dim]
  int64_t offset;           // of the head
  int64_t k_stride;
  int32_t head_dim;
  const uint32_t* packed_k;  // the split as attention_bf16.h packs it, or null
  const uint32_t* packed_v;
};

// Bytes of a key from which on values are fetched ahead.  Blocks are scattered, which the hardware
// does not foresee; but in a small one it has its own prefetch going before ours would help.
constexpr int32_t kFetchBytes = 128;

// What the keys of one chunk of rows weigh.
struct Weights {
  const float* p;       // [rows, kSplit], or bf16 in the first half of each row
  const Range* ranges;  // of each row
  Range touched;        // that any row sees
  Range shared;         // that all rows see
};

// The products of a chunk of some number of rows.
template <typename T>
struct Kernels {
  // Dot products with the keys of the tiles that `touched` lies in, to scores [rows, kSplit].
  void (*score)(const SplitView<T>& view, const void* q, Range touched, float* scores);
  // a[r] = sum of p_r * v, [rows, stride].
  void (*weigh)(const SplitView<T>& view, const Weights& weights, float* a, int64_t stride);
};

// Scores are kept times log2(e), which the queries carry already unless there is a soft-cap:
// powers of two are cheaper than powers of e.
constexpr float kLog2E = 1.44269504088896f;

// 2^x for x <= 0; -infinity is 0, NaN stays.  (Coefficients: Remez, on [-1/2, 1/2], with
// p(0) = 1.)  Within 1 ulp, or within 2^-18 for weights that are rounded to bf16 anyway.
template <bool BF16>
PLL_INLINE vf vexp2_weight(vf x) {
  x = vmax(vset1(-160.0f), x);
  const vf n = vround(x);
  const vf r = vsub(x, n);
  vf p;
  if (BF16) {
    p = vset1(9.7829129e-3f);
    p = vfma(p, r, vset1(5.5976883e-2f));
    p = vfma(p, r, vset1(2.4020711e-1f));
    p = vfma(p, r, vset1(6.9311363e-1f));
  } else {
    p = vset1(1.5594677e-4f);
    p = vfma(p, r, vset1(1.3406643e-3f));
    p = vfma(p, r, vset1(9.6176928e-3f));
    p = vfma(p, r, vset1(5.5503104e-2f));
    p = vfma(p, r, vset1(2.4022652e-1f));
    p = vfma(p, r, vset1(6.9314724e-1f));
  }
  p = vfma(p, r, vset1(1.0f));
  return vscale2(p, n);
}

// 16 weights to bf16.
PLL_INLINE void store_bf16_weights(uint16_t* to, vf p) {
#if PLL_ISA >= PLL_ISA_AVX512_BF16
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(p.v));
#else
  vstore_bf16(to, p);
#endif
}

// One row of a chunk, as the softmax sees it.
struct Row {
  Range range;
  float slope;   // ALiBi's, times log2(e)
  float offset;  // first key of the split minus the query's position
};

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
PLL_INLINE vf map_scores(vf s, int32_t t, const Row& row, float softcap) {
  if (softcap > 0) {
    s = vmul(vset1(softcap * kLog2E), vtanh(vdiv(s, vset1(softcap))));
  }
  if (row.slope != 0) {
    const vf distance = vadd(vset1(row.offset + static_cast<float>(t)), vload(kLanes));
    s = vadd(s, vmul(vset1(row.slope), distance));
  }
  return s;
}

PLL_INLINE int32_t first_tile_key(Range range) { return range.low & ~(kTile - 1); }

// Products of one row to scores, in place; returns the largest.
PLL_INLINE float finish_scores(float* scores, const Row& row, float softcap) {
  const Range range = row.range;
  const int32_t inner = (range.low + kTile - 1) & ~(kTile - 1), end = range.high & ~(kTile - 1);
  const bool mapped = softcap > 0 || row.slope != 0;
  vf high = vset1(-INFINITY);
  for (int32_t t = first_tile_key(range); t < range.high; t += kTile) {
    const bool edge = t < inner || t >= end;
    vf s = vload(scores + t);
    if (mapped) s = map_scores(s, t, row, softcap);
    if (edge) s = hide(s, t, range);
    if (mapped || edge) vstore(scores + t, s);
    high = vmax(high, s);
  }
  return vreduce_max(high);
}

// Scores of one row to weights 2^(score - m), in place; returns their sum.
template <bool BF16>
PLL_INLINE float weights_of(float* scores, Range range, float m) {
  vf sum = vzero();
  for (int32_t t = first_tile_key(range); t < range.high; t += kTile) {
    const vf p = vexp2_weight<BF16>(vsub(vload(scores + t), vset1(m)));
    if (BF16) {
      // Never beyond what was read.
      store_bf16_weights(reinterpret_cast<uint16_t*>(scores) + t, p);
    } else {
      vstore(scores + t, p);
    }
    sum = vadd(sum, p);
  }
  return vreduce_add(sum);
}

// Products of some rows to their weights, m and l; l < 0: the row sees no key.  All maxima come
// first, so that no row waits for the end of its own.
template <bool BF16>
void soften(float* scores, const Row* rows, int32_t num_rows, float softcap, float* m, float* l) {
  for (int32_t r = 0; r < num_rows; ++r) {
    if (rows[r].range.low >= rows[r].range.high) continue;
    m[r] = finish_scores(scores + r * kSplit, rows[r], softcap);
  }
  for (int32_t r = 0; r < num_rows; ++r) {
    l[r] = rows[r].range.low < rows[r].range.high
               ? weights_of<BF16>(scores + r * kSplit, rows[r].range, m[r])
               : -1;
  }
}

// What some rows have seen: m and l of each, l < 0: nothing yet; a [rows, padded].
struct RowStates {
  float* m;
  float* l;
  float* a;
};

// Joins a later split's results to those of at most 16 rows.
PLL_INLINE void join(const RowStates& to, const RowStates& split, int32_t num_rows,
                     int32_t padded) {
  alignas(64) float keep[16], take[16];
  const vf before = vload_n(to.m, num_rows), after = vload_n(split.m, num_rows);
  const vf top = vmax(before, after);
  vstore(keep, vexp2_weight<false>(vsub(before, top)));
  vstore(take, vexp2_weight<false>(vsub(after, top)));
  alignas(64) float tops[16];
  vstore(tops, top);
  for (int32_t r = 0; r < num_rows; ++r) {
    if (split.l[r] < 0) continue;  // not "l >= 0": a NaN must come through
    float* a = to.a + int64_t(r) * padded;
    const float* more = split.a + int64_t(r) * padded;
    if (to.l[r] < 0) {
      to.m[r] = split.m[r];
      to.l[r] = split.l[r];
      memcpy(a, more, padded * sizeof(float));
      continue;
    }
    const vf vkeep = vset1(keep[r]), vtake = vset1(take[r]);
    for (int32_t d = 0; d < padded; d += 16) {
      vstore(a + d, vfma(vload(a + d), vkeep, vmul(vload(more + d), vtake)));
    }
    to.l[r] = to.l[r] * keep[r] + split.l[r] * take[r];
    to.m[r] = tops[r];
  }
}

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif

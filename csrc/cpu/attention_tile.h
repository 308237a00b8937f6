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
// replaced, never multiplied away, and V there is not multiplied on the row's behalf unless all of
// it is known to be finite (the weight is then 0, and so is the product).
//
// This file has what all storage formats share: softmax and joining.  The products are in
// attention_float.h, attention_bf16.h and attention_int8.h.
#ifndef PYLLMLITE_CPU_ATTENTION_TILE_H
#define PYLLMLITE_CPU_ATTENTION_TILE_H

#include "cpu/simd.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kTile = 16;
constexpr int32_t kSplit = 256;
constexpr int32_t kSplitTiles = kSplit / kTile;

// Rows that share loads: a kernel takes at most so many.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int32_t kRows = 8;
#define PLL_EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#elif PLL_ISA >= PLL_ISA_AVX2
constexpr int32_t kRows = 4;
#define PLL_EACH_ROW_COUNT(X) X(1) X(2) X(3) X(4)
#else
constexpr int32_t kRows = 2;
#define PLL_EACH_ROW_COUNT(X) X(1) X(2)
#endif
// Rows of a chunk, which may be those of several heads: what the softmax takes together.
constexpr int32_t kChunkRows = kRows < 8 ? 8 : 16;

// Keys [low, high) of the split, in 0 .. 256.
struct Range {
  int32_t low, high;
};

// Where a split's tiles of one KV head lie; those outside of the range asked for are not set.
template <typename T>
struct SplitView {
  const T* k[kSplitTiles];           // + k_offset: [head_dim, stride k_stride], or as ops.h has it
  const T* v[kSplitTiles];           // + v_offset: [16, head_dim]
  const float* scales[kSplitTiles];  // + scale_offset: of 16 keys; value_scales behind, of values
  int64_t k_offset, v_offset, scale_offset;  // of the head
  int64_t k_stride;
  int32_t value_scales;
  int32_t head_dim;
  // Where the tiles of the split that comes next lie: its keys are fetched while these values are
  // read, as the values are while the keys are.
  const T* next_k[kSplitTiles];
  const float* next_scales[kSplitTiles];
  int64_t next_k_offset, next_scale_offset;
  const uint32_t* packed_k;  // the split as attention_bf16.h packs it, or null
  const uint32_t* packed_v;
  bool finite;  // all that is packed of V is
};

// Blocks are scattered, which the hardware does not foresee.  Into the second-level cache: what is
// fetched is used thousands of cycles later.
PLL_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The line of the next keys' tile t whose turn it is when line i of the tile of values is read.
PLL_INLINE void fetch_keys(const SplitView<float>& view, int32_t t, int32_t i) {
  fetch(view.next_k[t] + view.next_k_offset + i * view.k_stride);
}
// A line has two tiles side by side, or two dimensions of one.
PLL_INLINE void fetch_keys(const SplitView<uint16_t>& view, int32_t t, int32_t i) {
  fetch(view.next_k[t] + view.next_k_offset + (2 * i + (t & 1)) * view.k_stride);
}

// What the keys of one kernel's rows weigh.
struct Weights {
  const float* p;        // [rows, kSplit], or narrower from the start of each row
  const float* factors;  // [rows], where weights are integers: what one of them stands for
  const Range* ranges;   // of each row
  Range touched;         // that any row sees
  Range shared;          // that all rows see
};

// Queries as their reader packed them: [rows, stride] floats.
struct Queries {
  const float* data;
  int64_t stride;
};

// The products of some number of rows.
template <typename T>
struct Kernels {
  // Dot products with the keys of the tiles that `touched` lies in, to scores [rows, kSplit].
  void (*score)(const SplitView<T>& view, const Queries& q, Range touched, float* scores);
  // a[r] = sum of p_r * v, [rows, stride].
  void (*weigh)(const SplitView<T>& view, const Weights& weights, float* a, int64_t stride);
};

// Scores are kept times log2(e), which the queries carry already unless there is a soft-cap:
// powers of two are cheaper than powers of e.
constexpr float kLog2E = 1.44269504088896f;

// 2^x for x <= 0, at least 2^-126 or, for smaller x, less; NaN stays.  Within 2 ulp, or within
// 2^-18 where that is enough (ROUGH: weights that are rounded to bf16 or 16 bits afterwards).
#if PLL_ISA >= PLL_ISA_AVX512
// The instructions for fraction and scale take x as it is, -infinity too.  (Coefficients: minimax,
// on [0, 1], with p(0) = 1.)
template <bool ROUGH>
PLL_INLINE vf vexp2_weight(vf x) {
  const vf r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};
  vf p;
  if (ROUGH) {
    p = vset1(1.34266857e-2f);
    p = vfma(p, r, vset1(5.22424728e-2f));
    p = vfma(p, r, vset1(2.41280213e-1f));
    p = vfma(p, r, vset1(6.93044841e-1f));
  } else {
    p = vset1(2.16129163e-4f);
    p = vfma(p, r, vset1(1.24678458e-3f));
    p = vfma(p, r, vset1(9.67545155e-3f));
    p = vfma(p, r, vset1(5.54852821e-2f));
    p = vfma(p, r, vset1(2.40229309e-1f));
    p = vfma(p, r, vset1(6.93147063e-1f));
  }
  p = vfma(p, r, vset1(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
}
#else
// 2^n of a float whose low bits hold n + 127.
#if PLL_ISA_IS_256
PLL_INLINE vf power_of_low_bits(vf a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 23))};
}
#else
PLL_INLINE vf power_of_low_bits(vf a) {
  PLL_EACH a.v[i] = (f4)((u4)a.v[i] << 23);
  return a;
}
#endif

// Adding 1.5 * 2^23 + 127 leaves the integral part n + 127 in the low bits, which makes 2^n by a
// shift.  (Coefficients: Remez, on [-1/2, 1/2], with p(0) = 1.)
template <bool ROUGH>
PLL_INLINE vf vexp2_weight(vf x) {
  const vf magic = vset1(12583039.0f);
  x = vmax(vset1(-126.0f), x);
  const vf t = vadd(x, magic);
  const vf r = vsub(x, vsub(t, magic));
  vf p;
  if (ROUGH) {
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
  return vmul(p, power_of_low_bits(t));
}
#endif

// 16 weights to bf16.
PLL_INLINE void store_bf16_weights(uint16_t* to, vf p) {
#if PLL_ISA >= PLL_ISA_AVX512_BF16
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(p.v));
#else
  vstore_bf16(to, p);
#endif
}

// 32 weights to bf16.
PLL_INLINE void store_bf16_weights(uint16_t* to, vf low, vf high) {
#if PLL_ISA >= PLL_ISA_AVX512_BF16
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
#else
  vstore_bf16(to, low);
  vstore_bf16(to + 16, high);
#endif
}

// One row of a chunk, as the softmax sees it.
struct Row {
  Range range;
  float slope;     // ALiBi's, times log2(e)
  float offset;    // first key of the split minus the query's position
  int64_t scales;  // SplitView.scale_offset of its head
};

alignas(64) constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// `hidden` in the lanes of the tile at key t that lie outside of the range.
PLL_INLINE vf hide(vf s, int32_t t, Range range, float hidden) {
  const vf lane = vload(kLanes);
  if (t < range.low) {
    s = vselect_gt(lane, vset1(static_cast<float>(range.low - t) - 0.5f), s, vset1(hidden));
  }
  if (t + kTile > range.high) {
    s = vselect_gt(vset1(static_cast<float>(range.high - t) - 0.5f), lane, s, vset1(hidden));
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

PLL_INLINE int32_t tile_down(int32_t key) { return key & ~(kTile - 1); }
PLL_INLINE int32_t tile_up(int32_t key) { return (key + kTile - 1) & ~(kTile - 1); }

#if defined(__SANITIZE_ADDRESS__)
#define PLL_INLINE_BODY
#else
#define PLL_INLINE_BODY __attribute__((always_inline))
#endif

// body(t, edge) for every tile of the range, ascending; edge: the range begins or ends in it.
// Tiles that are no edge come as pair(t), which stands for t and the next, as long as there are
// two.
template <typename BODY, typename PAIR>
PLL_INLINE void each_tile(Range range, BODY body, PAIR pair) {
  const int32_t end = tile_down(range.high);
  int32_t t = tile_down(range.low);
  if (t < range.low || t >= end) {
    body(t, true);
    t += kTile;
  }
  for (; t + kTile < end; t += 2 * kTile) pair(t);
  if (t < end) {
    body(t, false);
    t += kTile;
  }
  if (t < range.high) body(t, true);
}

// Products of one row to scores, in place; returns the largest.
PLL_INLINE float finish_scores(float* scores, const Row& row, float softcap) {
  vf high = vset1(-INFINITY);
  const bool mapped = softcap > 0 || row.slope != 0;
  auto one = [&](int32_t t, bool edge) PLL_INLINE_BODY {
    vf s = vload(scores + t);
    if (mapped) s = map_scores(s, t, row, softcap);
    if (edge) s = hide(s, t, row.range, -INFINITY);
    if (mapped) vstore(scores + t, s);
    high = vmax(high, s);
  };
  if (mapped) {
    for (int32_t t = tile_down(row.range.low); t < row.range.high; t += kTile) one(t, true);
  } else {
    each_tile(row.range, one, [&](int32_t t) PLL_INLINE_BODY {
      high = vmax(vmax(high, vload(scores + t)), vload(scores + t + kTile));
    });
  }
  return vreduce_max(high);
}

// Scores of one row to weights 2^(score - m), in place, 0 for keys of the touched tiles that it
// does not see; returns their sum.
template <bool BF16>
PLL_INLINE float weights_of(float* scores, Range range, Range touched, float m) {
  vf sum = vzero();
  const vf top = vset1(m);
  uint16_t* narrow = reinterpret_cast<uint16_t*>(scores);
  // Narrower weights never stand beyond what was read.
  auto put = [&](int32_t t, vf p) PLL_INLINE_BODY {
    if (BF16) {
      store_bf16_weights(narrow + t, p);
    } else {
      vstore(scores + t, p);
    }
  };
  for (int32_t t = tile_down(touched.low); t < tile_down(range.low); t += kTile) put(t, vzero());
  each_tile(
      range,
      [&](int32_t t, bool edge) PLL_INLINE_BODY {
        vf p = vexp2_weight<BF16>(vsub(vload(scores + t), top));
        if (edge) p = hide(p, t, range, 0);
        put(t, p);
        sum = vadd(sum, p);
      },
      [&](int32_t t) PLL_INLINE_BODY {
        const vf low = vexp2_weight<BF16>(vsub(vload(scores + t), top));
        const vf high = vexp2_weight<BF16>(vsub(vload(scores + t + kTile), top));
        if (BF16) {
          store_bf16_weights(narrow + t, low, high);
        } else {
          vstore(scores + t, low);
          vstore(scores + t + kTile, high);
        }
        sum = vadd(vadd(sum, low), high);
      });
  for (int32_t t = tile_up(range.high); t < touched.high; t += kTile) put(t, vzero());
  return vreduce_add(sum);
}

// Products of some rows to their weights, m and l; l < 0: the row sees no key.  All maxima come
// first, so that no row waits for the end of its own.
template <bool BF16>
void softmax_rows(float* scores, const Row* rows, int32_t num_rows, Range touched, float softcap,
            float* m, float* l) {
  for (int32_t r = 0; r < num_rows; ++r) {
    if (rows[r].range.low >= rows[r].range.high) continue;
    m[r] = finish_scores(scores + r * kSplit, rows[r], softcap);
  }
  for (int32_t r = 0; r < num_rows; ++r) {
    if (rows[r].range.low < rows[r].range.high) {
      l[r] = weights_of<BF16>(scores + r * kSplit, rows[r].range, touched, m[r]);
    } else {
      l[r] = -1;
    }
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

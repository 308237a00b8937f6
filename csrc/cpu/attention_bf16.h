// Attention's products on AVX512-BF16: pairs of bf16 products, summed in f32 (VDPBF16PS).
//
// Queries and weights are rounded to bf16, as FlashAttention does in bf16.  For the scores a pair
// is two dimensions of a key, for the value sum keys 2 i and 2 i + 1 of the sequence: pairs stand
// at absolute positions, and where a row sees one key of a pair the other's value is masked, so
// that a row's bits depend on its position alone.
//
// The cache has neither kind of pair side by side; they are put together while they are read.  A
// unit with many rows does that once for all of them and keeps the split in the packed form: K
// [tile][pair of dimensions][16 keys], V [vector of columns][pair of keys][16 columns], 32 bits
// each.
#ifndef PYLLMLITE_CPU_ATTENTION_BF16_H
#define PYLLMLITE_CPU_ATTENTION_BF16_H

#include "cpu/attention_tile.h"

#if PLL_ISA >= PLL_ISA_AVX512_BF16

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kSplitPairs = kSplit / 2, kTilePairs = kTile / 2;
constexpr __mmask32 kFirstOfPair = 0x55555555u, kSecondOfPair = 0xaaaaaaaau;

// Rows times vectors accumulators: enough to hide the latency, few enough for the registers.
constexpr int pair_vectors_for(int rows) { return rows <= 4 ? 4 : 2; }

// Lane i: element i of a, element i of b.
PLL_INLINE __m512i interleave(__m256i a, __m256i b) {
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order),
                                  _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

PLL_INLINE __m256i load_16(const uint16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }

PLL_INLINE __m512bh as_bf16(__m512i x) { return (__m512bh)x; }

// A pair of dimensions of 16 keys; the last dimension of an odd head has zeros for a partner.
PLL_INLINE __m512i key_pair(const uint16_t* k, int64_t stride, int32_t pair, int32_t head_dim) {
  const uint16_t* first = k + 2 * pair * stride;
  return interleave(load_16(first),
                    2 * pair + 1 < head_dim ? load_16(first + stride) : _mm256_setzero_si256());
}

// 16 columns of a pair of keys; of a PARTIAL vector only the lanes in the mask exist.
template <bool PARTIAL>
PLL_INLINE __m512i value_pair(const uint16_t* v, int32_t head_dim, __mmask16 lanes) {
  if (PARTIAL) {
    return interleave(_mm256_maskz_loadu_epi16(lanes, v),
                      _mm256_maskz_loadu_epi16(lanes, v + head_dim));
  }
  return interleave(load_16(v), load_16(v + head_dim));
}

PLL_INLINE int32_t pairs_of(int32_t n) { return (n + 1) / 2; }

// Scores of N tiles.  A row of q: pairs of dimensions.
template <int R, int N, bool PACKED>
PLL_INLINE void score_pair_tiles(const SplitView<uint16_t>& view, const Queries& q, int32_t tile,
                                 float* scores) {
  const int32_t pairs = pairs_of(view.head_dim);
  const uint16_t* k[N];
  const uint16_t* v[N];
  for (int j = 0; j < N && !PACKED; ++j) {
    k[j] = view.k[tile + j] + view.k_offset;
    v[j] = view.v[tile + j] + view.v_offset;
  }
  const uint32_t* packed = view.packed_k + int64_t(tile) * pairs * kTile;
  const uint32_t* rows[R] = {};
  for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const uint32_t*>(q.data + r * q.stride);
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = _mm512_setzero_ps();
  }
  for (int32_t i = 0; i < pairs; ++i) {
    __m512bh keys[N];
    for (int j = 0; j < N; ++j) {
      if (PACKED) {
        keys[j] = as_bf16(_mm512_load_si512(packed + (int64_t(j) * pairs + i) * kTile));
      } else {
        keys[j] = as_bf16(key_pair(k[j], view.k_stride, i, view.head_dim));
        fetch(v[j] + i * 2 * kTile);  // a tile of V has as many bytes as one of K
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m512bh x = as_bf16(_mm512_set1_epi32(static_cast<int32_t>(rows[r][i])));
      for (int j = 0; j < N; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, keys[j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) {
      _mm512_storeu_ps(scores + r * kSplit + (tile + j) * kTile, sums[r][j]);
    }
  }
}

template <int R, bool PACKED>
void score_pairs(const SplitView<uint16_t>& view, const Queries& q, Range touched, float* scores) {
  constexpr int N = pair_vectors_for(R);
  const int32_t last = (touched.high + kTile - 1) / kTile;
  int32_t tile = touched.low / kTile;
  for (; tile + N <= last; tile += N) {
    score_pair_tiles<R, N, PACKED>(view, q, tile, scores);
  }
  if (N > 2 && tile + 2 <= last) {
    score_pair_tiles<R, 2, PACKED>(view, q, tile, scores);
    tile += 2;
  }
  for (; tile < last; ++tile) score_pair_tiles<R, 1, PACKED>(view, q, tile, scores);
}

// Which of keys `key` and `key + 1` a row sees, for each lane.
PLL_INLINE __mmask32 seen_of_pair(Range range, int32_t key) {
  return (key >= range.low && key < range.high ? kFirstOfPair : 0u) |
         (key + 1 >= range.low && key + 1 < range.high ? kSecondOfPair : 0u);
}

// a[r][16 j ..] = sum over a row's keys of p_r * v, for N vectors of v's columns from the
// given one on.
template <int R, int N, bool PACKED, bool PARTIAL>
PLL_INLINE void weigh_pair_columns(const SplitView<uint16_t>& view, int32_t vector,
                                   const Weights& w, float* a, int64_t stride) {
  const int32_t head_dim = view.head_dim;
  const __mmask16 lanes = PARTIAL ? mask_n(head_dim - 16 * vector) : 0xffff;
  const uint32_t* packed = view.packed_v + int64_t(vector) * kSplitPairs * 16;
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = _mm512_setzero_ps();
  }
  for (int32_t t = w.touched.low / kTile; t * kTile < w.touched.high; ++t) {
    const uint16_t* v = PACKED ? nullptr : view.v[t] + view.v_offset + 16 * vector;
    auto values_of = [&](int32_t pair, __m512i(&values)[N]) {
      for (int j = 0; j < N; ++j) {
        if (PACKED) {
          const int64_t at = int64_t(j) * kSplitPairs + t * kTilePairs + pair;
          values[j] = _mm512_load_si512(packed + at * 16);
        } else {
          values[j] = value_pair<PARTIAL>(v + int64_t(2 * pair) * head_dim + 16 * j, head_dim,
                                          lanes);
          fetch_keys(view, t, (vector + j) * kTilePairs + pair);
        }
      }
    };
    const uint32_t* p = reinterpret_cast<const uint32_t*>(w.p) + t * kTilePairs;
    if ((PACKED && view.finite) ||
        (t * kTile >= w.shared.low && (t + 1) * kTile <= w.shared.high)) {
      for (int32_t pair = 0; pair < kTilePairs; ++pair) {
        __m512i values[N];
        values_of(pair, values);
        for (int r = 0; r < R; ++r) {
          const __m512bh x = as_bf16(_mm512_set1_epi32(static_cast<int32_t>(p[r * kSplit + pair])));
          for (int j = 0; j < N; ++j) {
            sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, as_bf16(values[j]));
          }
        }
      }
      continue;
    }
    for (int32_t pair = 0; pair < kTilePairs; ++pair) {
      const int32_t key = t * kTile + 2 * pair;
      if (key + 1 < w.touched.low || key >= w.touched.high) continue;
      __m512i values[N];
      values_of(pair, values);
      for (int r = 0; r < R; ++r) {
        const __mmask32 seen = seen_of_pair(w.ranges[r], key);
        if (!seen) continue;
        const __m512bh x = as_bf16(_mm512_set1_epi32(static_cast<int32_t>(p[r * kSplit + pair])));
        for (int j = 0; j < N; ++j) {
          sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x,
                                        as_bf16(_mm512_maskz_mov_epi16(seen, values[j])));
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) {
      _mm512_storeu_ps(a + r * stride + 16 * (vector + j), sums[r][j]);
    }
  }
}

template <int R, bool PACKED>
void weigh_pairs(const SplitView<uint16_t>& view, const Weights& w, float* a, int64_t stride) {
  constexpr int N = pair_vectors_for(R);
  const int32_t whole = view.head_dim / 16;
  int32_t vector = 0;
  for (; vector + N <= whole; vector += N) {
    weigh_pair_columns<R, N, PACKED, false>(view, vector, w, a, stride);
  }
  for (; vector < whole; ++vector) {
    weigh_pair_columns<R, 1, PACKED, false>(view, vector, w, a, stride);
  }
  if (view.head_dim % 16 != 0) {
    weigh_pair_columns<R, 1, PACKED, true>(view, vector, w, a, stride);
  }
}

// How a bf16 cache is read on AVX512-BF16.
struct Bf16Reader {
  using Element = uint16_t;

  static constexpr int kDims = 1;
  static int32_t key_dims(int32_t head_dim) { return head_dim; }
  static int64_t key_stride(int32_t block_size) { return block_size; }

  static void pack_query(const float* q, int32_t head_dim, float scale, float* to) {
    for (int32_t d = 0; d < head_dim; d += 32) {
      const vf low = vmul(vload_n(q + d, head_dim - d), vset1(scale));
      const vf high =
          d + 16 < head_dim ? vmul(vload_n(q + d + 16, head_dim - d - 16), vset1(scale)) : vzero();
      _mm512_storeu_si512(to + d / 2, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
  }

  static constexpr bool packs(int32_t rows) { return rows > 2 * kRows; }

  // The tiles that the range touches, all columns; returns whether all of V there is finite.
  static bool pack_split(const SplitView<uint16_t>& view, Range range, uint32_t* packed_k,
                         uint32_t* packed_v) {
    const int32_t pairs = pairs_of(view.head_dim), vectors = (view.head_dim + 15) / 16;
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 special = 0;
    for (int32_t t = range.low / kTile; t * kTile < range.high; ++t) {
      const uint16_t* k = view.k[t] + view.k_offset;
      const uint16_t* v = view.v[t] + view.v_offset;
      for (int32_t i = 0; i < pairs; ++i) {
        _mm512_store_si512(packed_k + (int64_t(t) * pairs + i) * kTile,
                           key_pair(k, view.k_stride, i, view.head_dim));
        fetch(v + i * 2 * kTile);
      }
      for (int32_t j = 0; j < vectors; ++j) {
        uint32_t* to = packed_v + (int64_t(j) * kSplitPairs + t * kTilePairs) * 16;
        const __mmask16 lanes = mask_n(view.head_dim - 16 * j);
        for (int32_t pair = 0; pair < kTilePairs; ++pair) {
          const uint16_t* from = v + int64_t(2 * pair) * view.head_dim + 16 * j;
          const __m512i values = value_pair<true>(from, view.head_dim, lanes);
          special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(values, exponent), exponent);
          _mm512_store_si512(to + pair * 16, values);
        }
      }
    }
    return special == 0;
  }

  static void soften(const SplitView<uint16_t>&, float* scores, const Row* rows, int32_t num_rows,
                     Range touched, float softcap, float* m, float* l, float*) {
    softmax_rows<true>(scores, rows, num_rows, touched, softcap, m, l);
  }

  static Kernels<uint16_t> kernels(int32_t rows, bool packed) {
#define PLL_KERNELS(R)                                                        \
  case R:                                                                     \
    if (packed) return {score_pairs<R, true>, weigh_pairs<R, true>};          \
    return {score_pairs<R, false>, weigh_pairs<R, false>};
    switch (rows) {
      PLL_EACH_ROW_COUNT(PLL_KERNELS)
      default:
        return {nullptr, nullptr};
    }
#undef PLL_KERNELS
  }
};

}  // namespace
}  // namespace pyllmlite::PLL_NS

#endif
#endif

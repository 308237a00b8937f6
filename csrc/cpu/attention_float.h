// Attention's products in f32: whatever is stored becomes f32 when it is loaded.
#ifndef PYLLMLITE_CPU_ATTENTION_FLOAT_H
#define PYLLMLITE_CPU_ATTENTION_FLOAT_H

#include "cpu/attention_tile.h"

namespace pyllmlite::PLL_NS {
namespace {

// The value sum of a row runs in this many chains, tile t in chain t % kChains, added up in
// ascending order: a small head has too few columns to hide the latency of a multiply-add.
constexpr int kChains = 4;

// Vectors in flight per row: rows times vectors accumulators must fit the registers and hide that
// latency.
#if PLL_ISA >= PLL_ISA_AVX512
constexpr int kAccumulators = 16;
constexpr int vectors_for(int rows) { return rows <= 4 ? 4 : 2; }
#elif PLL_ISA >= PLL_ISA_AVX2
constexpr int kAccumulators = 4;
constexpr int vectors_for(int rows) { return rows == 1 ? 4 : (rows == 2 ? 2 : 1); }
#else
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

// scores[r][16 t ..] = q_r . k for N tiles.  q is already scaled.
template <typename T, int R, int N>
PLL_INLINE void score_tiles(const SplitView<T>& view, const Queries& q, int32_t tile,
                            float* scores) {
  const T* k[N];
  const T* v[N];
  for (int j = 0; j < N; ++j) {
    k[j] = view.k[tile + j] + view.k_offset;
    v[j] = view.v[tile + j] + view.v_offset;
  }
  const float* rows[R] = {};
  for (int r = 0; r < R; ++r) rows[r] = q.data + r * q.stride;
  vf sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) sums[r][j] = vzero();
  }
  for (int32_t d = 0; d < view.head_dim; ++d) {
    vf keys[N];
    for (int j = 0; j < N; ++j) {
      keys[j] = load_kv(k[j] + d * view.k_stride);
      // A tile of V has as many bytes as one of K.
      if (sizeof(T) == 4 || d % 2 == 0) fetch(v[j] + d * 16);
    }
    for (int r = 0; r < R; ++r) {
      const vf x = vset1(rows[r][d]);
      for (int j = 0; j < N; ++j) sums[r][j] = vfma(x, keys[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) vstore(scores + r * kSplit + (tile + j) * kTile, sums[r][j]);
  }
}

template <typename T, int R>
void score_split(const SplitView<T>& view, const Queries& q, Range touched, float* scores) {
  constexpr int N = vectors_for(R);
  const int32_t last = (touched.high + kTile - 1) / kTile;
  int32_t tile = touched.low / kTile;
  for (; tile + N <= last; tile += N) score_tiles<T, R, N>(view, q, tile, scores);
  if (N > 2 && tile + 2 <= last) {
    score_tiles<T, R, 2>(view, q, tile, scores);
    tile += 2;
  }
  for (; tile < last; ++tile) score_tiles<T, R, 1>(view, q, tile, scores);
}

// Some vectors of V's columns; of a PARTIAL one only `lanes` exist.
struct Columns {
  int32_t first, lanes;
};

// sums[r][j] += p_r * v over the keys of tile t.  EACH: rows see different keys of the tile.
template <typename T, int R, int N, bool PARTIAL, bool EACH>
PLL_INLINE void weigh_tile(const T* v, int32_t head_dim, Columns columns, int32_t t,
                           const Weights& w, vf (&sums)[R][N]) {
  const int32_t low = w.touched.low > t * kTile ? w.touched.low : t * kTile;
  const int32_t high = w.touched.high < (t + 1) * kTile ? w.touched.high : (t + 1) * kTile;
  const T* row = v + int64_t(low - t * kTile) * head_dim + columns.first;
  for (int32_t key = low; key < high; ++key, row += head_dim) {
    vf values[N];
    for (int j = 0; j < N; ++j) {
      values[j] = PARTIAL ? load_kv_n(row + j * 16, columns.lanes) : load_kv(row + j * 16);
    }
    for (int r = 0; r < R; ++r) {
      if (EACH && (key < w.ranges[r].low || key >= w.ranges[r].high)) continue;
      const vf x = vset1(w.p[r * kSplit + key]);
      for (int j = 0; j < N; ++j) sums[r][j] = vfma(x, values[j], sums[r][j]);
    }
  }
}

// F whole tiles that all rows see, side by side.
template <typename T, int R, int N, int F, bool PARTIAL>
PLL_INLINE void weigh_whole(const SplitView<T>& view, int32_t tile, Columns columns,
                            const float* p, vf (&sums)[F][R][N]) {
  const int32_t head_dim = view.head_dim, vectors = (head_dim + 15) / 16;
  for (int32_t key = 0; key < kTile; ++key) {
    for (int f = 0; f < F; ++f) {
      const T* row = view.v[tile + f] + view.v_offset + int64_t(key) * head_dim + columns.first;
      vf values[N];
      for (int j = 0; j < N; ++j) {
        if (sizeof(T) == 4 || key % 2 == 0) {
          const int32_t line = sizeof(T) == 4 ? key : key / 2;
          fetch_keys(view, tile + f, line * vectors + columns.first / 16 + j);
        }
        values[j] = PARTIAL ? load_kv_n(row + j * 16, columns.lanes) : load_kv(row + j * 16);
      }
      for (int r = 0; r < R; ++r) {
        const vf x = vset1(p[r * kSplit + f * kTile + key]);
        for (int j = 0; j < N; ++j) sums[f][r][j] = vfma(x, values[j], sums[f][r][j]);
      }
    }
  }
}

// a[r][16 j ..] = sum over a row's keys of p_r * v, for N vectors of v's columns; F chains at a
// time.
template <typename T, int R, int N, int F, bool PARTIAL>
PLL_INLINE void weigh_columns(const SplitView<T>& view, Columns columns, const Weights& w,
                              float* a, int64_t stride) {
  const bool same = w.touched.low == w.shared.low && w.touched.high == w.shared.high;
  const int32_t last = (w.touched.high + kTile - 1) / kTile, head_dim = view.head_dim;
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
        weigh_whole<T, R, N, F, PARTIAL>(view, t, columns, w.p + t * kTile, sums);
        continue;
      }
      for (int f = 0; f < F; ++f) {
        if ((t + f) * kTile >= w.touched.high || (t + f + 1) * kTile <= w.touched.low) continue;
        const T* v = view.v[t + f] + view.v_offset;
        if (same) {
          weigh_tile<T, R, N, PARTIAL, false>(v, head_dim, columns, t + f, w, sums[f]);
        } else {
          weigh_tile<T, R, N, PARTIAL, true>(v, head_dim, columns, t + f, w, sums[f]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        float* to = a + r * stride + columns.first + j * 16;
        vf total = chain == 0 ? sums[0][r][j] : vadd(vload(to), sums[0][r][j]);
        for (int f = 1; f < F; ++f) total = vadd(total, sums[f][r][j]);
        vstore(to, total);
      }
    }
  }
}

template <typename T, int R>
void weigh_values(const SplitView<T>& view, const Weights& w, float* a, int64_t stride) {
  const int32_t head_dim = view.head_dim;
  constexpr int N = vectors_for(R), F = chains_for(R, N), F1 = chains_for(R, 1);
  int32_t column = 0;
  for (; column + 16 * N <= head_dim; column += 16 * N) {
    weigh_columns<T, R, N, F, false>(view, {column, 16}, w, a, stride);
  }
  for (; column + 16 <= head_dim; column += 16) {
    weigh_columns<T, R, 1, F1, false>(view, {column, 16}, w, a, stride);
  }
  if (column < head_dim) {
    weigh_columns<T, R, 1, F1, true>(view, {column, head_dim - column}, w, a, stride);
  }
}

// How keys and values of type T are read and multiplied: as f32.
template <typename T>
struct FloatReader {
  using Element = T;
  static constexpr int kDims = 1;
  static int32_t key_dims(int32_t head_dim) { return head_dim; }
  static int64_t key_stride(int32_t block_size) { return block_size; }

  static void pack_query(const float* q, int32_t head_dim, float scale, float* to) {
    for (int32_t d = 0; d < head_dim; d += 16) {
      vstore(to + d, vmul(vload_n(q + d, head_dim - d), vset1(scale)));
    }
  }

  // Whether a unit of so many rows packs its keys and values first.
  static constexpr bool packs(int32_t) { return false; }
  static bool pack_split(const SplitView<T>&, Range, uint32_t*, uint32_t*) { return false; }

  static void soften(const SplitView<T>&, float* scores, const Row* rows, int32_t num_rows,
                     Range touched, float softcap, float* m, float* l, float*) {
    softmax_rows<false>(scores, rows, num_rows, touched, softcap, m, l);
  }

  static Kernels<T> kernels(int32_t rows, bool) {
#define PLL_KERNELS(R) \
  case R:              \
    return {score_split<T, R>, weigh_values<T, R>};
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

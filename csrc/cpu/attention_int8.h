// Attention's products over int8 keys and values, in integers.
//
// Queries are quantized per row and weights per row and split, both to 16 bits (symmetric): their
// rounding is then far below the 8 bits of what is stored.  A product of 16 and 8 bits is exact,
// and so are its sums in 32 bits: over a head's dimensions, and over the 256 keys of a split
// (32767 * 127 * 256 < 2^31).  Nothing depends on their order, nor on the instruction set, and a
// key that a row does not see has the weight 0 whatever its bytes are.
//
// VPDPBUSD multiplies bytes, unsigned by signed, and sums four of them: so four dimensions of a
// key, and four keys of a column, stand side by side in the cache, and a 16-bit number is taken
// as two bytes, in two products.  That is as many instructions as bf16 needs for its pairs, with
// nothing to be unpacked or put side by side.  The scale of a key multiplies its score, and that
// of a value the weight of its key.
#ifndef PYLLMLITE_CPU_ATTENTION_INT8_H
#define PYLLMLITE_CPU_ATTENTION_INT8_H

#include "cpu/attention_tile.h"

namespace pyllmlite::PLL_NS {
namespace {

constexpr int32_t kTileQuads = kTile / 4;
constexpr float kWeightCodes = 32767;
// What is smaller than this counts as zero: its inverse would overflow.
constexpr float kLeastMagnitude = 1e-30f;

PLL_INLINE int32_t quads_of(int32_t n) { return (n + 3) / 4; }

PLL_INLINE void fetch_keys(const SplitView<int8_t>& view, int32_t t, int32_t i) {
  fetch(view.next_k[t] + view.next_k_offset + i * view.k_stride);
}
PLL_INLINE void fetch_scales(const SplitView<int8_t>& view, int32_t t) {
  fetch(view.next_scales[t] + view.next_scale_offset);
  fetch(view.next_scales[t] + view.next_scale_offset + view.value_scales);
}

// Largest query code: the sum over a head must fit 32 bits, and the code two bytes.
PLL_INLINE float query_codes(int32_t head_dim) {
  const int64_t most = INT32_MAX / (int64_t(127) * head_dim);
  return static_cast<float>(most < 32639 ? most : 32639);
}

// A row of packed queries: codes, then what one of them stands for, then the start of the sum.
// Codes are int16; with VPDPBUSD, high bytes and low bytes, `padded` of each.
struct QueryTail {
  float scale;
  int32_t start;
};
PLL_INLINE QueryTail* tail_of(float* row, int64_t padded) {
  return reinterpret_cast<QueryTail*>(row + padded / 2);
}
PLL_INLINE const QueryTail* tail_of(const float* row, int64_t padded) {
  return reinterpret_cast<const QueryTail*>(row + padded / 2);
}

#if PLL_ISA >= PLL_ISA_AVX512

// Codes of 16 lanes to bytes; the low one is signed where SIGNED.
template <bool SIGNED>
PLL_INLINE void split_codes(__m512i codes, void* high, void* low) {
  const __m512i rest =
      SIGNED ? _mm512_sub_epi32(codes, _mm512_srai_epi32(_mm512_slli_epi32(codes, 24), 24)) : codes;
  _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
  _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(codes));
}

PLL_INLINE int32_t pack_codes(const float* q, int32_t head_dim, vf factor, float* row,
                              int64_t padded) {
  char* to = reinterpret_cast<char*>(row);
  __m512i sum = _mm512_setzero_si512();
  for (int32_t d = 0; d < head_dim; d += 16) {
    const __m512i codes = _mm512_cvtps_epi32(vmul(vload_n(q + d, head_dim - d), factor).v);
    sum = _mm512_add_epi32(sum, codes);
    split_codes<true>(codes, to + d, to + padded + d);
  }
  // Keys are taken as code + 128.
  return -128 * _mm512_reduce_add_epi32(sum);
}

PLL_INLINE void store_weight_codes(uint8_t* tile, vf p) {
  split_codes<false>(_mm512_cvtps_epi32(p.v), tile, tile + 16);
}

PLL_INLINE __m512i set4(const void* bytes) {
  int32_t x;
  memcpy(&x, bytes, 4);
  return _mm512_set1_epi32(x);
}

// Rows times vectors, twice: sums of the high and of the low bytes.
constexpr int code_vectors_for(int rows) { return rows <= 2 ? 4 : (rows <= 4 ? 2 : 1); }

template <int R, int N>
PLL_INLINE void score_code_tiles(const SplitView<int8_t>& view, const Queries& q, int32_t tile,
                                 float* scores) {
  const int32_t quads = quads_of(view.head_dim);
  const int8_t* k[N];
  const int8_t* v[N];
  for (int j = 0; j < N; ++j) {
    k[j] = view.k[tile + j] + view.k_offset;
    v[j] = view.v[tile + j] + view.v_offset;
  }
  const char* rows[R] = {};
  for (int r = 0; r < R; ++r) rows[r] = reinterpret_cast<const char*>(q.data + r * q.stride);
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i high[R][N], low[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) high[r][j] = low[r][j] = _mm512_setzero_si512();
  }
  for (int32_t i = 0; i < quads; ++i) {
    __m512i keys[N];
    for (int j = 0; j < N; ++j) {
      keys[j] = _mm512_xor_si512(_mm512_loadu_si512(k[j] + i * view.k_stride), flip);
      fetch(v[j] + i * 64);  // a tile of V has as many bytes as one of K
    }
    for (int r = 0; r < R; ++r) {
      const __m512i x = set4(rows[r] + 4 * i), y = set4(rows[r] + q.stride + 4 * i);
      for (int j = 0; j < N; ++j) high[r][j] = _mm512_dpbusd_epi32(high[r][j], keys[j], x);
      for (int j = 0; j < N; ++j) low[r][j] = _mm512_dpbusd_epi32(low[r][j], keys[j], y);
    }
  }
  for (int j = 0; j < N; ++j) {
    const vf scales = vload(view.scales[tile + j] + view.scale_offset);
    for (int r = 0; r < R; ++r) {
      const QueryTail* tail = tail_of(q.data + r * q.stride, q.stride);
      // Parts of the sum may wrap around, the whole does not.
      const __m512i all =
          _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]),
                           _mm512_set1_epi32(tail->start));
      const vf s = vmul({_mm512_cvtepi32_ps(all)}, vmul(scales, vset1(tail->scale)));
      vstore(scores + r * kSplit + (tile + j) * kTile, s);
    }
  }
}

template <int R>
void score_codes(const SplitView<int8_t>& view, const Queries& q, Range touched, float* scores) {
  constexpr int N = code_vectors_for(R);
  const int32_t last = (touched.high + kTile - 1) / kTile;
  int32_t tile = touched.low / kTile;
  for (; tile + N <= last; tile += N) score_code_tiles<R, N>(view, q, tile, scores);
  if (N > 2 && tile + 2 <= last) {
    score_code_tiles<R, 2>(view, q, tile, scores);
    tile += 2;
  }
  for (; tile < last; ++tile) score_code_tiles<R, 1>(view, q, tile, scores);
}

// N vectors of 16 columns from the given one on; of a PARTIAL one only `lanes` exist.
template <int R, int N, bool PARTIAL>
PLL_INLINE void weigh_code_columns(const SplitView<int8_t>& view, int32_t vector, const Weights& w,
                                   float* a, int64_t stride) {
  const int32_t head_dim = view.head_dim;
  const __mmask16 lanes = PARTIAL ? mask_n(head_dim - 16 * vector) : 0xffff;
  const int32_t last = (w.touched.high + kTile - 1) / kTile;
  __m512i high[R][N], low[R][N];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) high[r][j] = low[r][j] = _mm512_setzero_si512();
  }
  for (int32_t t = w.touched.low / kTile; t < last; ++t) {
    const int8_t* v = view.v[t] + view.v_offset + 64 * vector;
    const char* p = reinterpret_cast<const char*>(w.p) + 32 * t;
    if (vector == 0) fetch_scales(view, t);
    for (int32_t quad = 0; quad < kTileQuads; ++quad) {
      __m512i values[N];
      for (int j = 0; j < N; ++j) {
        const int8_t* from = v + int64_t(quad) * 4 * head_dim + 64 * j;
        values[j] = PARTIAL ? _mm512_maskz_loadu_epi32(lanes, from) : _mm512_loadu_si512(from);
        fetch_keys(view, t, (vector + j) * kTileQuads + quad);
      }
      for (int r = 0; r < R; ++r) {
        const char* mine = p + r * kSplit * sizeof(float) + 4 * quad;
        const __m512i x = set4(mine), y = set4(mine + 16);
        for (int j = 0; j < N; ++j) high[r][j] = _mm512_dpbusd_epi32(high[r][j], x, values[j]);
        for (int j = 0; j < N; ++j) low[r][j] = _mm512_dpbusd_epi32(low[r][j], y, values[j]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < N; ++j) {
      const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]);
      vstore(a + r * stride + 16 * (vector + j),
             vmul({_mm512_cvtepi32_ps(all)}, vset1(w.factors[r])));
    }
  }
}

template <int R>
void weigh_codes(const SplitView<int8_t>& view, const Weights& w, float* a, int64_t stride) {
  constexpr int N = code_vectors_for(R);
  const int32_t whole = view.head_dim / 16;
  int32_t vector = 0;
  for (; vector + N <= whole; vector += N) {
    weigh_code_columns<R, N, false>(view, vector, w, a, stride);
  }
  for (; vector < whole; ++vector) weigh_code_columns<R, 1, false>(view, vector, w, a, stride);
  if (view.head_dim % 16 != 0) weigh_code_columns<R, 1, true>(view, vector, w, a, stride);
}

#else

PLL_INLINE int32_t pack_codes(const float* q, int32_t head_dim, vf factor, float* row, int64_t) {
  int16_t* to = reinterpret_cast<int16_t*>(row);
  for (int32_t d = 0; d < head_dim; d += 16) {
    float codes[16];
    vstore(codes, vround(vmul(vload_n(q + d, head_dim - d), factor)));
    for (int i = 0; i < 16; ++i) {
      // Not a number: any code, the scale is not one either.
      to[d + i] = codes[i] == codes[i] ? static_cast<int16_t>(codes[i]) : int16_t(0);
    }
  }
  return 0;
}

#if PLL_ISA_IS_256

PLL_INLINE void store_weight_codes(uint8_t* tile, vf p) {
  const __m256i codes = _mm256_packs_epi32(_mm256_cvtps_epi32(p.lo), _mm256_cvtps_epi32(p.hi));
  _mm256_storeu_si256((__m256i*)tile, _mm256_permute4x64_epi64(codes, 0xd8));
}

PLL_INLINE __m256i set4(const int16_t* codes) {
  int64_t x;
  memcpy(&x, codes, 8);
  return _mm256_set1_epi64x(x);
}
PLL_INLINE __m256i widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
}
// Eight sums of four products each, from the halves of them in two vectors.
PLL_INLINE __m256i join_halves(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
}

template <int R>
void score_codes(const SplitView<int8_t>& view, const Queries& q, Range touched, float* scores) {
  const int32_t quads = quads_of(view.head_dim), last = (touched.high + kTile - 1) / kTile;
  for (int32_t half = touched.low / kTile * 2; half < last * 2; ++half) {  // eight keys
    const int32_t tile = half / 2, first = half % 2 * 8;
    const int8_t* k = view.k[tile] + view.k_offset + 4 * first;
    const int8_t* v = view.v[tile] + view.v_offset;
    __m256i sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int32_t i = 0; i < quads; ++i) {
      const __m256i low = widen(k + i * view.k_stride), high = widen(k + i * view.k_stride + 16);
      if (first == 0) fetch(v + i * 64);  // a tile of V has as many bytes as one of K
      for (int r = 0; r < R; ++r) {
        const __m256i x = set4(reinterpret_cast<const int16_t*>(q.data + r * q.stride) + 4 * i);
        sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(low, x));
        sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(high, x));
      }
    }
    const __m256 scales = _mm256_loadu_ps(view.scales[tile] + view.scale_offset + first);
    for (int r = 0; r < R; ++r) {
      const QueryTail* tail = tail_of(q.data + r * q.stride, q.stride);
      const __m256 s = _mm256_cvtepi32_ps(join_halves(sums[r][0], sums[r][1]));
      _mm256_storeu_ps(scores + r * kSplit + tile * kTile + first,
                       _mm256_mul_ps(s, _mm256_mul_ps(scales, _mm256_set1_ps(tail->scale))));
    }
  }
}

template <int R>
void weigh_codes(const SplitView<int8_t>& view, const Weights& w, float* a, int64_t stride) {
  const int32_t head_dim = view.head_dim, last = (w.touched.high + kTile - 1) / kTile;
  for (int32_t column = 0; column < head_dim; column += 8) {
    const int32_t columns = head_dim - column < 8 ? head_dim - column : 8;
    __m256i sums[R][2];
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int32_t t = w.touched.low / kTile; t < last; ++t) {
      const int8_t* v = view.v[t] + view.v_offset + 4 * column;
      if (column == 0) fetch_scales(view, t);
      for (int32_t quad = 0; quad < kTileQuads; ++quad) {
        const int8_t* from = v + int64_t(quad) * 4 * head_dim;
        if (column % 16 == 0) fetch_keys(view, t, column / 16 * kTileQuads + quad);
        int8_t padded[32];
        if (columns < 8) {
          memset(padded, 0, sizeof(padded));
          memcpy(padded, from, 4 * columns);
          from = padded;
        }
        const __m256i low = widen(from), high = widen(from + 16);
        for (int r = 0; r < R; ++r) {
          const __m256i x = set4(reinterpret_cast<const int16_t*>(w.p + r * kSplit) + t * kTile +
                                 4 * quad);
          sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(low, x));
          sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(high, x));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      const __m256 sum = _mm256_cvtepi32_ps(join_halves(sums[r][0], sums[r][1]));
      _mm256_storeu_ps(a + r * stride + column, _mm256_mul_ps(sum, _mm256_set1_ps(w.factors[r])));
    }
  }
}

#else

PLL_INLINE void store_weight_codes(uint8_t* tile, vf p) {
  float codes[16];
  int16_t narrow[16];
  vstore(codes, vround(p));
  for (int i = 0; i < 16; ++i) {
    narrow[i] = codes[i] == codes[i] ? static_cast<int16_t>(codes[i]) : int16_t(0);
  }
  memcpy(tile, narrow, sizeof(narrow));
}

template <int R>
void score_codes(const SplitView<int8_t>& view, const Queries& q, Range touched, float* scores) {
  const int32_t quads = quads_of(view.head_dim), last = (touched.high + kTile - 1) / kTile;
  for (int32_t t = touched.low / kTile; t < last; ++t) {
    const int8_t* k = view.k[t] + view.k_offset;
    const float* scales = view.scales[t] + view.scale_offset;
    for (int r = 0; r < R; ++r) {
      const int16_t* x = reinterpret_cast<const int16_t*>(q.data + r * q.stride);
      const QueryTail* tail = tail_of(q.data + r * q.stride, q.stride);
      int32_t sums[kTile] = {};
      for (int32_t i = 0; i < quads; ++i) {
        const int8_t* codes = k + i * view.k_stride;
        for (int key = 0; key < kTile; ++key) {
          for (int d = 0; d < 4; ++d) sums[key] += int32_t(codes[4 * key + d]) * x[4 * i + d];
        }
      }
      for (int key = 0; key < kTile; ++key) {
        scores[r * kSplit + t * kTile + key] =
            static_cast<float>(sums[key]) * (scales[key] * tail->scale);
      }
    }
  }
}

template <int R>
void weigh_codes(const SplitView<int8_t>& view, const Weights& w, float* a, int64_t stride) {
  const int32_t head_dim = view.head_dim, last = (w.touched.high + kTile - 1) / kTile;
  for (int r = 0; r < R; ++r) {
    const int16_t* p = reinterpret_cast<const int16_t*>(w.p + r * kSplit);
    for (int32_t column = 0; column < head_dim; column += 16) {
      const int32_t columns = head_dim - column < 16 ? head_dim - column : 16;
      int32_t sums[16] = {};
      for (int32_t t = w.touched.low / kTile; t < last; ++t) {
        const int8_t* v = view.v[t] + view.v_offset + 4 * column;
        for (int32_t quad = 0; quad < kTileQuads; ++quad) {
          const int8_t* codes = v + int64_t(quad) * 4 * head_dim;
          const int16_t* x = p + t * kTile + 4 * quad;
          for (int32_t c = 0; c < columns; ++c) {
            for (int i = 0; i < 4; ++i) sums[c] += int32_t(codes[4 * c + i]) * x[i];
          }
        }
      }
      for (int32_t c = 0; c < columns; ++c) {
        a[r * stride + column + c] = static_cast<float>(sums[c]) * w.factors[r];
      }
    }
  }
}

#endif
#endif

// Scores of one row to codes of weight times value scale, 32 bytes a tile, in place: sets the
// factor that they have in common and returns the sum of the weights.
PLL_INLINE float code_weights(const SplitView<int8_t>& view, float* scores, const Row& row,
                              Range touched, float m, float* factor) {
  const Range range = row.range;
  const vf top = vset1(m);
  vf sum = vzero(), scaled = vzero(), high = vzero();
  auto one = [&](int32_t t, bool edge) PLL_INLINE_BODY {
    vf p = vexp2_weight<true>(vsub(vload(scores + t), top));
    if (edge) p = hide(p, t, range, 0);
    sum = vadd(sum, p);
    p = vmul(p, vload(view.scales[t / kTile] + row.scales + view.value_scales));
    if (edge) p = hide(p, t, range, 0);
    scaled = vadd(scaled, p);
    high = vmax(high, p);
    vstore(scores + t, p);
  };
  each_tile(range, one, [&](int32_t t) PLL_INLINE_BODY {
    one(t, false);
    one(t + kTile, false);
  });
  const float largest = vreduce_max(high), total = vreduce_add(scaled);
  const bool some = largest >= kLeastMagnitude;
  *factor = total == total ? (some ? largest / kWeightCodes : 0.0f) : total;  // NaN stays
  const vf inverse = vset1(some ? kWeightCodes / largest : 0.0f);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scores);
  for (int32_t t = tile_down(touched.low); t < tile_down(range.low); t += kTile) {
    memset(codes + 2 * t, 0, 32);
  }
  for (int32_t t = tile_down(range.low); t < range.high; t += kTile) {
    store_weight_codes(codes + 2 * t, vmul(vload(scores + t), inverse));
  }
  for (int32_t t = tile_up(range.high); t < touched.high; t += kTile) memset(codes + 2 * t, 0, 32);
  return vreduce_add(sum);
}

// How an int8 cache is read.
struct Int8Reader {
  using Element = int8_t;
  static constexpr int kDims = 4;
  static int32_t key_dims(int32_t head_dim) { return 4 * quads_of(head_dim); }
  static int64_t key_stride(int32_t block_size) { return 4 * int64_t(block_size); }

  static void pack_query(const float* q, int32_t head_dim, float scale, float* to) {
    const int64_t padded = (head_dim + 15) / 16 * 16;
    vf high = vzero(), special = vzero();
    for (int32_t d = 0; d < head_dim; d += 16) {
      const vf x = vload_n(q + d, head_dim - d);
      high = vmax(high, vabs(x));
      special = vfma(x, vzero(), special);  // NaN where x is not finite
    }
    const float largest = vreduce_max(high), nothing = vreduce_add(special);
    const float codes = query_codes(head_dim);
    const bool some = largest >= kLeastMagnitude && nothing == 0;
    QueryTail* tail = tail_of(to, padded);
    tail->scale = nothing == 0 ? (some ? scale * (largest / codes) : 0.0f) : nothing;
    tail->start = pack_codes(q, head_dim, vset1(some ? codes / largest : 0.0f), to, padded);
  }

  static constexpr bool packs(int32_t) { return false; }
  static bool pack_split(const SplitView<int8_t>&, Range, uint32_t*, uint32_t*) { return false; }

  static void soften(const SplitView<int8_t>& view, float* scores, const Row* rows,
                     int32_t num_rows, Range touched, float softcap, float* m, float* l,
                     float* factors) {
    for (int32_t r = 0; r < num_rows; ++r) {
      if (rows[r].range.low >= rows[r].range.high) continue;
      m[r] = finish_scores(scores + r * kSplit, rows[r], softcap);
    }
    for (int32_t r = 0; r < num_rows; ++r) {
      l[r] = -1;
      factors[r] = 0;
      if (rows[r].range.low >= rows[r].range.high) continue;
      l[r] = code_weights(view, scores + r * kSplit, rows[r], touched, m[r], factors + r);
    }
  }

  static Kernels<int8_t> kernels(int32_t rows, bool) {
#define PLL_KERNELS(R) \
  case R:              \
    return {score_codes<R>, weigh_codes<R>};
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

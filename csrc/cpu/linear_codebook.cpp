// Tile kernels for CODEBOOK4 weights (NF4, FP4) with float rows: a code picks one of 16 floats that
// stand in registers (QLoRA, Dettmers et al. 2023).

#include "linear_segments.h"

namespace pyllmlite::PLL_NS {
namespace {

#if PLL_ISA >= PLL_ISA_AVX512
struct Codebook {
  __m512 table;
  explicit Codebook(const float* values) : table(_mm512_loadu_ps(values)) {}
  // The value of the nibble at bit SHIFT of every lane.
  template <int SHIFT>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(w.v, SHIFT), table)};
  }
};
#elif PLL_ISA >= PLL_ISA_AVX2
struct Codebook {
  __m256 low, high;  // values 0 to 7 and 8 to 15
  explicit Codebook(const float* values)
      : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}
  // VPERMPS reads the low three bits of an index; bit 3, moved to the sign, picks the half.
  template <int SHIFT>
  inline __attribute__((always_inline)) __m256 half(__m256i w) const {
    const __m256i index = _mm256_srli_epi32(w, SHIFT);
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(w, 28 - SHIFT));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                            _mm256_permutevar8x32_ps(high, index), sign);
  }
  template <int SHIFT>
  inline __attribute__((always_inline)) vf get(vi w) const {
    return {half<SHIFT>(w.lo), half<SHIFT>(w.hi)};
  }
};
#else
struct Codebook {
  const float* values;
  explicit Codebook(const float* values) : values(values) {}
  template <int SHIFT>
  inline __attribute__((always_inline)) vf get(vi w) const {
    vf r;
    PLL_EACH for (int j = 0; j < 4; ++j) {
      r.v[i][j] = values[(static_cast<uint32_t>(w.v[i][j]) >> SHIFT) & 15];
    }
    return r;
  }
};
#endif

template <int ROWS, int PANELS>
struct CodebookKernel {
  static void run(const TileArgs& a) {
    const RowLayout& row = *a.row;
    const Codebook codebook(a.packed->codebook);
    const uint8_t* w[PANELS];
    PLL_UNROLL for (int p = 0; p < PANELS; ++p) w[p] = a.weight + p * a.panel_bytes;
    const float* x[ROWS];
    PLL_UNROLL for (int r = 0; r < ROWS; ++r)
        x[r] = reinterpret_cast<const float*>(a.rows + r * row.bytes);
    each_segment(a, [&](const Segment& s) {
      vf part[ROWS][PANELS];
      PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) part[r][p] = vzero();
      }
      for (int64_t k = s.k0; k < s.k1; k += 8) {
        vi raw[PANELS];
        vf value[PANELS];
        PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
          const uint8_t* from = w[p] + k * 8;
          raw[p] = vi_load(from);
          ask_ahead<PANELS>(from + a.ahead);
        }
#define PLL_COLUMN(j, SHIFT)                                                             \
  PLL_UNROLL for (int p = 0; p < PANELS; ++p) value[p] = codebook.get<SHIFT>(raw[p]); \
  add_column<ROWS, PANELS>(part, value, x, k + (j))
        PLL_COLUMN(0, 0);
        PLL_COLUMN(1, 8);
        PLL_COLUMN(2, 16);
        PLL_COLUMN(3, 24);
        PLL_COLUMN(4, 4);
        PLL_COLUMN(5, 12);
        PLL_COLUMN(6, 20);
        PLL_COLUMN(7, 28);
#undef PLL_COLUMN
      }
      PLL_UNROLL for (int p = 0; p < PANELS; ++p) {
        const int64_t at = p * a.panel_scales + s.group * 16;
        const vf scale = load_scales(*a.packed, a.scales, at);
        ask_ahead<PANELS>(scales_at(*a.packed, a.scales, at + a.ahead_scales));
        PLL_UNROLL for (int r = 0; r < ROWS; ++r) {
          float* to = a.acc + r * a.acc_stride + p * 16;
          vstore(to, vfma(part[r][p], scale, vload(to)));
        }
      }
    });
  }
};

}  // namespace

TileKernel codebook_kernel(int rows, int panels) {
  return KernelTable<CodebookKernel, MAX_ROWS>::find(rows, panels);
}

}  // namespace pyllmlite::PLL_NS

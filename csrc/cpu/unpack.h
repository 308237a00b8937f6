// One row of a packed matrix back as floats: what pack_linear put in, whatever the format.
#ifndef PYLLMLITE_CPU_UNPACK_H
#define PYLLMLITE_CPU_UNPACK_H

#include "simd.h"

namespace pyllmlite::PLL_NS {

PLL_INLINE float group_value(const void* table, bool wide, int64_t at) {
  return wide ? static_cast<const float*>(table)[at]
              : f16_to_f32(static_cast<const uint16_t*>(table)[at]);
}

PLL_INLINE int64_t packed_panel_bytes(WeightFormat format, int64_t k) {
  switch (format) {
    case WeightFormat::F32: return k * 64;
    case WeightFormat::BF16: return (k + 1) / 2 * 64;
    case WeightFormat::INT8: return (k + 3) / 4 * 64;
    case WeightFormat::INT4:
    case WeightFormat::CODEBOOK4: return (k + 7) / 8 * 64;
  }
  return 0;
}

// out[i] = the value of column i, of lane `lane` in panel `panel`.
PLL_INLINE void unpack_lane(const PackedLinear& w, int64_t panel, int64_t lane, float* out) {
  const int64_t k = w.k;
  const uint8_t* const from =
      static_cast<const uint8_t*>(w.data) + panel * packed_panel_bytes(w.format, k);
  if (w.format == WeightFormat::F32) {
    const float* values = reinterpret_cast<const float*>(from) + lane;
    for (int64_t i = 0; i < k; ++i) out[i] = values[i * 16];
    return;
  }
  if (w.format == WeightFormat::BF16) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(from) + lane * 2;
    for (int64_t i = 0; i < k; ++i) out[i] = bf16_to_f32(values[i / 2 * 32 + i % 2]);
    return;
  }
  const bool int8 = w.format == WeightFormat::INT8;
  const int64_t size = w.group_size == 0 || w.group_size >= k ? k : w.group_size;
  const int64_t groups = (k + size - 1) / size;
  const uint8_t* const codes = from + lane * 4;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = (panel * groups + g) * 16 + lane;
    const float scale = group_value(w.scales, w.wide_scales, at);
    const float low = w.mins ? group_value(w.mins, w.wide_scales, at) : 0.0f;
    const float zero = w.mins ? (w.zero_points ? low : 0.0f) : int8 ? 0.0f : 8.0f;
    const float min = w.zero_points ? 0.0f : low;
    const int64_t end = (g + 1) * size < k ? (g + 1) * size : k;
    for (int64_t i = g * size; i < end; ++i) {
      const int code = int8 ? static_cast<int8_t>(codes[i / 4 * 64 + i % 4])
                            : (codes[i / 8 * 64 + (i & 3)] >> (i & 4)) & 15;
      out[i] = w.format == WeightFormat::CODEBOOK4
                   ? scale * w.codebook[code]
                   : scale * (static_cast<float>(code) - zero) + min;
    }
  }
}

}  // namespace pyllmlite::PLL_NS

#endif

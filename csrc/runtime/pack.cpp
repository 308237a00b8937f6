// Packing and unpacking of weight matrices (see pack.h for the layouts).

#include "pyllmlite/pack.h"

#include <cstring>

// The conversions of simd.h, built for no instruction set in particular.
#undef PLL_NS
#undef PLL_ISA
#define PLL_NS packing
#define PLL_ISA 0
#include "../cpu/unpack.h"

namespace pyllmlite {
namespace {

using packing::f32_to_bf16;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t num_panels(int64_t n, bool gated) {
  return gated ? 2 * (round_up(n / 2, 16) / 16) : round_up(n, 16) / 16;
}

int64_t num_groups(WeightFormat format, int64_t k, int64_t group_size) {
  if (!has_groups(format)) return 0;
  return group_size == 0 || group_size >= k ? 1 : (k + group_size - 1) / group_size;
}

size_t panel_bytes(WeightFormat format, int64_t k) {
  return static_cast<size_t>(packing::packed_panel_bytes(format, k));
}

struct Place {
  int64_t panel;
  int64_t lane;
};

Place place_of(int64_t row, int64_t n, bool gated) {
  if (!gated) return {row / 16, row % 16};
  const int64_t half = n / 2;
  const int64_t up = row >= half ? 1 : 0;
  const int64_t j = row - up * half;
  return {2 * (j / 16) + up, j % 16};
}

void put_row(WeightFormat format, int64_t k, const void* values, int64_t row, uint8_t* panel,
             int64_t lane) {
  switch (format) {
    case WeightFormat::F32: {
      const float* from = static_cast<const float*>(values) + row * k;
      float* to = reinterpret_cast<float*>(panel) + lane;
      for (int64_t i = 0; i < k; ++i) to[i * 16] = from[i];
      break;
    }
    case WeightFormat::BF16: {
      const float* from = static_cast<const float*>(values) + row * k;
      uint16_t* to = reinterpret_cast<uint16_t*>(panel) + lane * 2;
      for (int64_t i = 0; i < k; ++i) to[i / 2 * 32 + i % 2] = f32_to_bf16(from[i]);
      break;
    }
    case WeightFormat::INT8: {
      const uint8_t* from = static_cast<const uint8_t*>(values) + row * k;
      uint8_t* to = panel + lane * 4;
      for (int64_t i = 0; i < k; ++i) to[i / 4 * 64 + i % 4] = from[i];
      break;
    }
    case WeightFormat::INT4:
    case WeightFormat::CODEBOOK4: {
      const uint8_t* from = static_cast<const uint8_t*>(values) + row * k;
      uint8_t* to = panel + lane * 4;
      for (int64_t i = 0; i < k; i += 8) {
        uint8_t bytes[4] = {0, 0, 0, 0};
        for (int64_t j = 0; j < 8 && i + j < k; ++j) {
          const uint8_t code = static_cast<uint8_t>(from[i + j] & 15);
          bytes[j & 3] = static_cast<uint8_t>(bytes[j & 3] | (j < 4 ? code : code << 4));
        }
        std::memcpy(to + i / 8 * 64, bytes, 4);
      }
      break;
    }
  }
}

}  // namespace

const char* pack_error(WeightFormat format, int64_t n, int64_t k, int64_t group_size,
                       bool gated) {
  if (n <= 0 || k <= 0) return "a weight matrix needs at least one row and one column";
  if (gated && n % 2 != 0) return "a gated weight matrix needs an even number of rows";
  if (group_size < 0) return "group_size must not be negative";
  const bool nibbles = format == WeightFormat::INT4 || format == WeightFormat::CODEBOOK4;
  if (nibbles && group_size % 8 != 0 && group_size < k)
    return "a 4-bit group_size must be a multiple of 8 (0: the whole row)";
  if (format == WeightFormat::INT8 && group_size % 4 != 0 && group_size < k)
    return "an int8 group_size must be a multiple of 4 (0: the whole row)";
  return nullptr;
}

PackedSize packed_size(WeightFormat format, int64_t n, int64_t k, int64_t group_size,
                       bool gated) {
  const size_t panels = static_cast<size_t>(num_panels(n, gated));
  return {panels * panel_bytes(format, k),
          panels * 16 * static_cast<size_t>(num_groups(format, k, group_size))};
}

void pack_rows(WeightFormat format, int64_t n, int64_t k, int64_t group_size, bool gated,
               int64_t first, int64_t count, const void* values, const void* scales,
               const void* mins, void* data_out, void* scales_out, void* mins_out,
               bool wide_scales) {
  const int64_t groups = num_groups(format, k, group_size);
  const int64_t stride = static_cast<int64_t>(panel_bytes(format, k));
  const int64_t item = wide_scales ? 4 : 2;
  const auto put = [&](void* to, const void* from, int64_t at, int64_t index) {
    if (to && from) {
      std::memcpy(static_cast<char*>(to) + at * item,
                  static_cast<const char*>(from) + index * item, static_cast<size_t>(item));
    }
  };
  for (int64_t r = 0; r < count; ++r) {
    const Place at = place_of(first + r, n, gated);
    put_row(format, k, values, r, static_cast<uint8_t*>(data_out) + at.panel * stride, at.lane);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t to = (at.panel * groups + g) * 16 + at.lane;
      put(scales_out, scales, to, r * groups + g);
      put(mins_out, mins, to, r * groups + g);
    }
  }
}

void pack_linear(WeightFormat format, int64_t n, int64_t k, int64_t group_size, bool gated,
                 const void* values, const void* scales, const void* mins, void* data_out,
                 void* scales_out, void* mins_out, bool wide_scales) {
  const PackedSize size = packed_size(format, n, k, group_size, gated);
  const size_t item = wide_scales ? 4 : 2;
  std::memset(data_out, 0, size.data_bytes);
  if (scales_out) std::memset(scales_out, 0, size.num_scales * item);
  if (mins_out) std::memset(mins_out, 0, size.num_scales * item);
  pack_rows(format, n, k, group_size, gated, 0, n, values, scales, mins, data_out, scales_out,
            mins_out, wide_scales);
}

void unpack_row(const PackedLinear& weight, int64_t row, float* out, bool gated) {
  const Place at = place_of(row, weight.n, gated);
  packing::unpack_lane(weight, at.panel, at.lane, out);
}

}  // namespace pyllmlite

#include "cpu/buffers.h"

#include <cstdio>

namespace pyllmlite {
namespace {

const char* dtype_name(int32_t dtype) {
  static const char* const names[] = {"f32", "bf16", "f16", "i8", "u8", "i32", "i64", "u32"};
  return dtype >= PLL_F32 && dtype <= PLL_U32 ? names[dtype] : "an unknown dtype";
}

}  // namespace

int64_t saturating_product(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

int64_t kv_elements(const KVLayout& kv, KVPart part) {
  const int64_t quads = (int64_t(kv.head_dim) + 3) / 4;
  int64_t width = kv.head_dim;
  if (part == KVPart::KEYS && kv.dtype == PLL_I8) width = 4 * quads;
  if (part == KVPart::SCALES) width = 2;
  return saturating_product(saturating_product(kv.num_blocks, kv.num_kv_heads),
                            width * kv.block_size);
}

int check_buffers(const BufferNeed* needs, int32_t num_needs, const pll_tensor* buffers,
                  int32_t num_buffers, char* error, size_t error_size) {
  if (num_buffers < num_needs) {
    snprintf(error, error_size, "it takes %d buffers, got %d", num_needs, num_buffers);
    return 1;
  }
  for (int32_t i = 0; i < num_needs; ++i) {
    const BufferNeed& need = needs[i];
    const pll_tensor& buffer = buffers[i];
    if (buffer.dtype != need.dtype) {
      snprintf(error, error_size, "buffer %d (%s) must be %s, not %s", i, need.name,
               dtype_name(need.dtype), dtype_name(buffer.dtype));
      return 1;
    }
    int64_t width = 1;
    for (int32_t d = need.rows == 0 ? 0 : 1; d < buffer.ndim; ++d) width *= buffer.shape[d];
    const int64_t rows = need.rows == 0 ? 0 : buffer.ndim > 0 ? buffer.shape[0] : 1;
    if (rows < need.rows || width < need.width) {
      const long long sizes[] = {need.rows, need.width, rows, width};
      if (need.rows == 0) {
        snprintf(error, error_size, "buffer %d (%s) needs %lld elements, has %lld", i, need.name,
                 sizes[1], sizes[3]);
      } else {
        snprintf(error, error_size, "buffer %d (%s) needs [%lld, %lld], has [%lld, %lld]", i,
                 need.name, sizes[0], sizes[1], sizes[2], sizes[3]);
      }
      return 1;
    }
  }
  return 0;
}

}  // namespace pyllmlite

// What a built-in op asks of its buffers, held against what it was given: see pll_op.check.
#ifndef PYLLMLITE_CPU_BUFFERS_H
#define PYLLMLITE_CPU_BUFFERS_H

#include "pyllmlite/ops.h"

namespace pyllmlite {

struct BufferNeed {
  const char* name;
  int32_t dtype;
  int64_t rows;   // of the first dimension; 0: whatever the shape, contiguous
  int64_t width;  // elements of a row; with rows 0 of the whole
};

// Returns 0, or says in `error` what does not fit.  Built once, not per instruction set.
int check_buffers(const BufferNeed* needs, int32_t num_needs, const pll_tensor* buffers,
                  int32_t num_buffers, char* error, size_t error_size);

// Elements of a layer's part of the cache (see KVLayout), at most INT64_MAX.
enum class KVPart { KEYS, VALUES, SCALES };
int64_t kv_elements(const KVLayout& kv, KVPart part);

// a * b for sizes, at most INT64_MAX.
int64_t saturating_product(int64_t a, int64_t b);

}  // namespace pyllmlite

#endif

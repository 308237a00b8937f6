// Memory for what is read every step: weights, buffers, KV.
#ifndef PYLLMLITE_MEMORY_H
#define PYLLMLITE_MEMORY_H

#include <cstddef>
#include <memory>

#include "pyllmlite/export.h"

namespace pyllmlite {

// At least `bytes` zeroed bytes, aligned to 64; std::bad_alloc if there are none.
//
// On Linux large pieces stand in huge pages if the kernel gives some: with pages of 4 KiB the
// address translation, not the memory, limits how fast a model's weights stream.  Smaller ones
// share chunks, and a chunk goes back when the last piece in it does.
PLL_API std::shared_ptr<void> allocate_zeroed(size_t bytes);

}  // namespace pyllmlite

#endif

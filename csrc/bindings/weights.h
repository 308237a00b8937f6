#ifndef PYLLMLITE_BINDINGS_WEIGHTS_H
#define PYLLMLITE_BINDINGS_WEIGHTS_H

#include "common.h"
#include "pyllmlite/pack.h"

namespace pyllmlite::bindings {

// What Python holds as `PackedLinear`: a packed matrix and its memory.
struct PyPackedLinear {
  PackedLinear weight;
  bool gated = false;
  size_t nbytes = 0;
  std::shared_ptr<void> data;
  std::shared_ptr<void> scales;
  std::shared_ptr<void> mins;
};

}  // namespace pyllmlite::bindings

#endif

#include "common.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "pyllmlite's compiled extension; see _native.pyi.";
  pyllmlite::bindings::bind_system(m);
  pyllmlite::bindings::bind_runtime(m);
  pyllmlite::bindings::bind_batch(m);
  pyllmlite::bindings::bind_weights(m);
  pyllmlite::bindings::bind_ops(m);
}

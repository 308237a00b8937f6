// Helpers between Python and the library; only csrc/bindings includes this.
#ifndef PYLLMLITE_BINDINGS_COMMON_H
#define PYLLMLITE_BINDINGS_COMMON_H

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pyllmlite/batch.h"
#include "pyllmlite/op.h"
#include "pyllmlite/program.h"

namespace pyllmlite::bindings {

namespace py = pybind11;

// int32 values of a list, a tuple or any other sequence of ints, read without an object per
// item.  Reused as a scratch: no allocation in the steady state.  TypeError, ValueError.
void read_ints(py::handle sequence, const char* what, std::vector<int32_t>* out);
inline Ints ints(const std::vector<int32_t>& values) { return {values.data(), values.size()}; }

// Keeps Python objects alive from C++; may be dropped without the GIL.
std::shared_ptr<void> keep_alive(std::vector<py::object> objects);

pll_dtype dtype_from_name(const std::string& name);
// numpy dtype in which values of `dtype` travel (bf16 and f16 as uint16 bits).
py::dtype numpy_dtype(int32_t dtype);
// ValueError for an array whose bytes are swapped.
void check_byte_order(const py::array& array, const std::string& what);
// An array as a tensor; `dtype_name` says what uint16 bits mean (empty: bf16).  ValueError where
// the array is not C-contiguous or its dtype has no meaning here.
pll_tensor tensor_of(const py::array& array, const std::string& dtype_name,
                     const std::string& what);
// View of a tensor's first `rows` rows; `base` owns the memory.
py::array view_of(const pll_tensor& tensor, int64_t rows, py::handle base, bool writable);

template <class T>
py::array view_of(const T* data, std::vector<py::ssize_t> shape, py::handle base, bool writable) {
  py::array array(py::dtype::of<T>(), std::move(shape), data, base);
  if (!writable) {
    py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  }
  return array;
}

// What Python holds as `Op`.
struct PyOp {
  OpPtr op;
  std::string name;
  uint32_t writes = 0;  // bit i: it writes its i-th buffer (31: and all after); 0 for a capsule's
};

// What Python holds as `Batch`: the batch, and the objects that it reads.
struct PyBatch {
  Batch batch;
  std::vector<py::object> keep;   // block tables
  std::vector<py::object> masks;  // of the step
  std::vector<int32_t> scratch[5];
  bool running = false;  // a Program reads it: only changed with the GIL

  // For whatever changes the step: RuntimeError while a Program runs it.
  Batch& idle() {
    if (running) throw std::runtime_error("the batch cannot be changed while a Program runs it");
    return batch;
  }
};

void bind_runtime(py::module_& m);
void bind_batch(py::module_& m);
void bind_weights(py::module_& m);
void bind_ops(py::module_& m);
void bind_system(py::module_& m);

}  // namespace pyllmlite::bindings

#endif

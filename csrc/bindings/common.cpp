#include "common.h"

#include <climits>

namespace pyllmlite::bindings {

void read_ints(py::handle sequence, const char* what, std::vector<int32_t>* out) {
  // PySequence_Fast gives lists and tuples back as they are.
  PyObject* fast = PySequence_Fast(sequence.ptr(), "expected a sequence of ints");
  if (fast == nullptr) throw py::error_already_set();
  const py::object owner = py::reinterpret_steal<py::object>(fast);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(fast);
  PyObject** items = PySequence_Fast_ITEMS(fast);
  out->resize(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    const long value = PyLong_AsLong(items[i]);
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (value < INT32_MIN || value > INT32_MAX) {
      throw py::value_error(std::string(what) + ": " + std::to_string(value) +
                            " does not fit into 32 bits");
    }
    (*out)[i] = static_cast<int32_t>(value);
  }
}

std::shared_ptr<void> keep_alive(std::vector<py::object> objects) {
  return std::shared_ptr<void>(new std::vector<py::object>(std::move(objects)), [](void* p) {
    // After the interpreter's end there is nothing left to release.
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    delete static_cast<std::vector<py::object>*>(p);
  });
}

pll_dtype dtype_from_name(const std::string& name) {
  static const std::pair<const char*, pll_dtype> names[] = {
      {"f32", PLL_F32}, {"bf16", PLL_BF16}, {"f16", PLL_F16}, {"i8", PLL_I8},
      {"u8", PLL_U8},   {"i32", PLL_I32},   {"i64", PLL_I64}, {"u32", PLL_U32},
      {"int8", PLL_I8}, {"uint8", PLL_U8},  {"int32", PLL_I32}, {"int64", PLL_I64},
  };
  for (const auto& [known, dtype] : names) {
    if (name == known) return dtype;
  }
  throw py::value_error("unknown dtype '" + name +
                        "'; known: f32, bf16, f16, i8, u8, i32, i64, u32");
}

py::dtype numpy_dtype(int32_t dtype) {
  switch (dtype) {
    case PLL_F32:
      return py::dtype::of<float>();
    case PLL_BF16:
    case PLL_F16:
      return py::dtype::of<uint16_t>();
    case PLL_I8:
      return py::dtype::of<int8_t>();
    case PLL_U8:
      return py::dtype::of<uint8_t>();
    case PLL_I32:
      return py::dtype::of<int32_t>();
    case PLL_I64:
      return py::dtype::of<int64_t>();
    case PLL_U32:
      return py::dtype::of<uint32_t>();
  }
  throw py::value_error("unknown dtype " + std::to_string(dtype));
}

void check_byte_order(const py::array& array, const std::string& what) {
  if (array.dtype().attr("isnative").cast<bool>()) return;
  throw py::value_error(what + ": an array of dtype " +
                        py::str(array.dtype()).cast<std::string>() +
                        " is not in this machine's byte order");
}

pll_tensor tensor_of(const py::array& array, const std::string& dtype_name,
                     const std::string& what) {
  check_byte_order(array, what);
  const char kind = array.dtype().kind();
  const py::ssize_t bytes = array.itemsize();
  pll_dtype dtype;
  if (kind == 'f' && bytes == 4) {
    dtype = PLL_F32;
  } else if (kind == 'f' && bytes == 2) {
    dtype = PLL_F16;
  } else if (kind == 'u' && bytes == 2) {
    dtype = dtype_name.empty() ? PLL_BF16 : dtype_from_name(dtype_name);
  } else if (kind == 'i' && (bytes == 1 || bytes == 4 || bytes == 8)) {
    dtype = bytes == 1 ? PLL_I8 : bytes == 4 ? PLL_I32 : PLL_I64;
  } else if (kind == 'u' && (bytes == 1 || bytes == 4)) {
    dtype = bytes == 1 ? PLL_U8 : PLL_U32;
  } else {
    throw py::value_error(what + ": arrays of dtype " + py::str(array.dtype()).cast<std::string>() +
                          " cannot be used");
  }
  if (!dtype_name.empty() && dtype_from_name(dtype_name) != dtype) {
    throw py::value_error(what + ": an array of dtype " +
                          py::str(array.dtype()).cast<std::string>() + " holds no " + dtype_name);
  }
  if (array.ndim() > 4) throw py::value_error(what + ": at most 4 dimensions are possible");
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(what + ": the array is not C-contiguous");
  }
  pll_tensor tensor{};
  tensor.data = const_cast<void*>(array.data());
  tensor.dtype = dtype;
  tensor.ndim = static_cast<int32_t>(array.ndim());
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    tensor.shape[i] = i < tensor.ndim ? array.shape(i) : 1;
    tensor.stride[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

py::array view_of(const pll_tensor& tensor, int64_t rows, py::handle base, bool writable) {
  std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim);
  if (!shape.empty()) shape[0] = rows;
  const py::dtype dtype = numpy_dtype(tensor.dtype);
  std::vector<py::ssize_t> strides;
  for (int32_t i = 0; i < tensor.ndim; ++i) strides.push_back(tensor.stride[i] * dtype.itemsize());
  py::array array(dtype, std::move(shape), std::move(strides), tensor.data, base);
  if (!writable) {
    py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  }
  return array;
}

}  // namespace pyllmlite::bindings

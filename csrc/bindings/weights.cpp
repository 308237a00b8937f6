#include "weights.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>

#include "pyllmlite/memory.h"

namespace pyllmlite::bindings {
namespace {

using OptionalArray = std::optional<py::array>;

WeightFormat format_from_name(const std::string& name) {
  if (name == "f32") return WeightFormat::F32;
  if (name == "bf16") return WeightFormat::BF16;
  if (name == "int8") return WeightFormat::INT8;
  if (name == "int4") return WeightFormat::INT4;
  throw py::value_error("unknown weight format '" + name + "'; known: f32, bf16, int8, int4");
}

const char* format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::F32:
      return "f32";
    case WeightFormat::BF16:
      return "bf16";
    case WeightFormat::INT8:
      return "int8";
    default:
      return "int4";
  }
}

bool has_scales(const PackedLinear& w) {
  return w.format == WeightFormat::INT8 || w.format == WeightFormat::INT4;
}

int64_t num_groups(const PackedLinear& w) {
  return w.group_size == 0 || w.group_size >= w.k ? 1 : (w.k + w.group_size - 1) / w.group_size;
}

PyPackedLinear empty(const std::string& format, int64_t n, int64_t k, int64_t group_size,
                     bool mins, bool gated) {
  PyPackedLinear p;
  p.weight.format = format_from_name(format);
  if (n < 1 || k < 1 || n > INT32_MAX || k > INT32_MAX) {
    throw py::value_error("a weight matrix has no shape [" + std::to_string(n) + ", " +
                          std::to_string(k) + "]");
  }
  if (group_size < 0) throw py::value_error("group_size must be at least 0");
  if (const char* error = pack_error(p.weight.format, n, k, group_size, gated)) {
    throw py::value_error("[" + std::to_string(n) + ", " + std::to_string(k) + "] as " + format +
                          ": " + error);
  }
  p.weight.n = n;
  p.weight.k = k;
  p.weight.group_size = group_size;
  p.gated = gated;
  if (mins && !has_scales(p.weight)) throw py::value_error("weights in " + format + " have no mins");
  const PackedSize size = packed_size(p.weight.format, n, k, group_size, gated);
  p.data = allocate_zeroed(size.data_bytes);
  p.weight.data = p.data.get();
  p.nbytes = size.data_bytes;
  if (has_scales(p.weight)) {
    p.scales = allocate_zeroed(size.num_scales * 2);
    p.weight.scales = static_cast<const uint16_t*>(p.scales.get());
    p.nbytes += size.num_scales * 2;
    if (mins) {
      p.mins = allocate_zeroed(size.num_scales * 2);
      p.weight.mins = static_cast<const uint16_t*>(p.mins.get());
      p.nbytes += size.num_scales * 2;
    }
  }
  return p;
}

void check_array(const py::array& array, int64_t rows, int64_t columns, const char* what) {
  check_byte_order(array, what);
  if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns) {
    std::string found;
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
      found += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
    }
    throw py::value_error(std::string(what) + " must have shape [" + std::to_string(rows) + ", " +
                          std::to_string(columns) + "], got [" + found + "]");
  }
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(what) + " is not C-contiguous");
  }
}

const uint16_t* group_values(const PyPackedLinear& p, const OptionalArray& array, bool wanted,
                             int64_t rows, const char* what) {
  if (!wanted) {
    if (array) throw py::value_error(std::string("this matrix has no ") + what);
    return nullptr;
  }
  if (!array) throw py::value_error(std::string("this matrix needs ") + what);
  const char kind = array->dtype().kind();
  if (array->itemsize() != 2 || (kind != 'f' && kind != 'u')) {
    throw py::value_error(std::string(what) + " must be float16");
  }
  check_array(*array, rows, num_groups(p.weight), what);
  return static_cast<const uint16_t*>(array->data());
}

void set_rows(PyPackedLinear& p, int64_t first, const py::array& values,
              const OptionalArray& scales, const OptionalArray& mins) {
  const PackedLinear& w = p.weight;
  const int64_t count = values.ndim() == 2 ? values.shape(0) : 0;
  check_array(values, count, w.k, "values");
  if (first < 0 || count > w.n - first) {
    throw py::value_error("rows " + std::to_string(first) + " to " +
                          std::to_string(first + count) + " do not lie in [0, " +
                          std::to_string(w.n) + ")");
  }
  const char kind = values.dtype().kind();
  const py::ssize_t bytes = values.itemsize();
  const bool is_float = w.format == WeightFormat::F32 || w.format == WeightFormat::BF16;
  const bool bf16_bits = w.format == WeightFormat::BF16 && kind == 'u' && bytes == 2;
  const bool fits = (is_float && kind == 'f' && bytes == 4) || bf16_bits ||
                    (w.format == WeightFormat::INT8 && kind == 'i' && bytes == 1) ||
                    (w.format == WeightFormat::INT4 && kind == 'u' && bytes == 1);
  if (!fits) {
    throw py::value_error(std::string("values for ") + format_name(w.format) + " must be " +
                          (w.format == WeightFormat::F32    ? "float32"
                           : w.format == WeightFormat::BF16 ? "float32, or uint16 bits of bf16"
                           : w.format == WeightFormat::INT8 ? "int8"
                                                            : "uint8") +
                          ", got " + py::str(values.dtype()).cast<std::string>());
  }
  const uint16_t* scale_bits = group_values(p, scales, w.scales != nullptr, count, "scales");
  const uint16_t* min_bits = group_values(p, mins, w.mins != nullptr, count, "mins");
  auto* data = static_cast<uint8_t*>(p.data.get());
  auto* scales_out = static_cast<uint16_t*>(p.scales.get());
  auto* mins_out = static_cast<uint16_t*>(p.mins.get());
  const void* source = values.data();

  py::gil_scoped_release release;
  if (!bf16_bits) {
    pack_rows(w.format, w.n, w.k, w.group_size, p.gated, first, count, source, scale_bits,
              min_bits, data, scales_out, mins_out);
    return;
  }
  // The packer reads floats: widen a few rows at a time.
  constexpr int64_t kRows = 16;
  std::vector<float> wide(static_cast<size_t>(kRows * w.k));
  const auto* bits = static_cast<const uint16_t*>(source);
  for (int64_t row = 0; row < count; row += kRows) {
    const int64_t rows = std::min(kRows, count - row);
    for (int64_t i = 0; i < rows * w.k; ++i) {
      const uint32_t word = static_cast<uint32_t>(bits[row * w.k + i]) << 16;
      std::memcpy(&wide[i], &word, sizeof(word));
    }
    pack_rows(w.format, w.n, w.k, w.group_size, p.gated, first + row, rows, wide.data(), nullptr,
              nullptr, data, nullptr, nullptr);
  }
}

PyPackedLinear pack(const std::string& format, const py::array& values,
                    const OptionalArray& scales, const OptionalArray& mins, int64_t group_size,
                    bool gated) {
  if (values.ndim() != 2) throw py::value_error("values must have two dimensions");
  PyPackedLinear p = empty(format, values.shape(0), values.shape(1), group_size,
                           mins.has_value(), gated);
  set_rows(p, 0, values, scales, mins);
  return p;
}

py::array_t<float> unpack(const PyPackedLinear& p, int64_t first, std::optional<int64_t> count) {
  const PackedLinear& w = p.weight;
  const int64_t rows = count.value_or(std::max<int64_t>(0, w.n - first));
  if (first < 0 || rows < 0 || rows > w.n - first) {
    throw py::value_error("rows " + std::to_string(first) + " to " + std::to_string(first + rows) +
                          " do not lie in [0, " + std::to_string(w.n) + ")");
  }
  py::array_t<float> out({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(w.k)});
  float* data = out.mutable_data();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < rows; ++i) unpack_row(w, first + i, data + i * w.k, p.gated);
  return out;
}

}  // namespace

void bind_weights(py::module_& m) {
  py::class_<PyPackedLinear>(m, "PackedLinear")
      .def(py::init(&pack), py::arg("format"), py::arg("values"), py::arg("scales") = py::none(),
           py::arg("mins") = py::none(), py::arg("group_size") = 0, py::arg("gated") = false)
      .def_static("empty", &empty, py::arg("format"), py::arg("n"), py::arg("k"),
                  py::arg("group_size") = 0, py::arg("mins") = false, py::arg("gated") = false)
      .def("set_rows", &set_rows, py::arg("first"), py::arg("values"),
           py::arg("scales") = py::none(), py::arg("mins") = py::none())
      .def_property_readonly("format",
                             [](const PyPackedLinear& p) { return format_name(p.weight.format); })
      .def_property_readonly(
          "shape", [](const PyPackedLinear& p) { return py::make_tuple(p.weight.n, p.weight.k); })
      .def_property_readonly("nbytes", [](const PyPackedLinear& p) { return p.nbytes; })
      .def("unpack", &unpack, py::arg("first") = 0, py::arg("count") = py::none());
}

}  // namespace pyllmlite::bindings

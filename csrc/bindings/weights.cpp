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
using Codebook = std::optional<py::array_t<float, py::array::c_style | py::array::forcecast>>;

WeightFormat format_from_name(const std::string& name) {
  if (name == "f32") return WeightFormat::F32;
  if (name == "bf16") return WeightFormat::BF16;
  if (name == "int8") return WeightFormat::INT8;
  if (name == "int4") return WeightFormat::INT4;
  if (name == "codebook4") return WeightFormat::CODEBOOK4;
  throw py::value_error("unknown weight format '" + name +
                        "'; known: f32, bf16, int8, int4, codebook4");
}

const char* format_name(WeightFormat format) {
  switch (format) {
    case WeightFormat::F32:
      return "f32";
    case WeightFormat::BF16:
      return "bf16";
    case WeightFormat::INT8:
      return "int8";
    case WeightFormat::CODEBOOK4:
      return "codebook4";
    default:
      return "int4";
  }
}

int64_t num_groups(const PackedLinear& w) {
  return w.group_size == 0 || w.group_size >= w.k ? 1 : (w.k + w.group_size - 1) / w.group_size;
}

PyPackedLinear empty(const std::string& format, int64_t n, int64_t k, int64_t group_size,
                     bool mins, bool gated, bool wide_scales, bool zero_points,
                     const Codebook& codebook) {
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
  const bool is_codebook = p.weight.format == WeightFormat::CODEBOOK4;
  if ((mins || zero_points) && (!has_groups(p.weight.format) || is_codebook)) {
    throw py::value_error("weights in " + format + " have no mins");
  }
  if (is_codebook != codebook.has_value() || (codebook && codebook->size() != 16)) {
    throw py::value_error("codebook4, and no other format, needs a codebook of 16 values");
  }
  if (codebook) std::copy(codebook->data(), codebook->data() + 16, p.weight.codebook);
  const PackedSize size = packed_size(p.weight.format, n, k, group_size, gated);
  p.data = allocate_zeroed(size.data_bytes);
  p.weight.data = p.data.get();
  p.nbytes = size.data_bytes;
  if (has_groups(p.weight.format)) {
    const size_t bytes = size.num_scales * (wide_scales ? 4 : 2);
    p.weight.wide_scales = wide_scales;
    p.weight.zero_points = zero_points;
    p.scales = allocate_zeroed(bytes);
    p.weight.scales = p.scales.get();
    p.nbytes += bytes;
    if (mins || zero_points) {
      p.mins = allocate_zeroed(bytes);
      p.weight.mins = p.mins.get();
      p.nbytes += bytes;
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

bool is_wide(const py::array& scales) {
  return scales.dtype().kind() == 'f' && scales.itemsize() == 4;
}

const void* group_values(const PyPackedLinear& p, const OptionalArray& array, bool wanted,
                         int64_t rows, const char* what) {
  if (!wanted) {
    if (array) throw py::value_error(std::string("this matrix has no ") + what);
    return nullptr;
  }
  if (!array) throw py::value_error(std::string("this matrix needs ") + what);
  const char kind = array->dtype().kind();
  const bool half = array->itemsize() == 2 && (kind == 'f' || kind == 'u');
  if (p.weight.wide_scales ? !is_wide(*array) : !half) {
    throw py::value_error(std::string(what) + " must be " +
                          (p.weight.wide_scales ? "float32" : "float16"));
  }
  check_array(*array, rows, num_groups(p.weight), what);
  return array->data();
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
                    (has_groups(w.format) && w.format != WeightFormat::INT8 && kind == 'u' &&
                     bytes == 1);
  if (!fits) {
    throw py::value_error(std::string("values for ") + format_name(w.format) + " must be " +
                          (w.format == WeightFormat::F32    ? "float32"
                           : w.format == WeightFormat::BF16 ? "float32, or uint16 bits of bf16"
                           : w.format == WeightFormat::INT8 ? "int8"
                                                            : "uint8") +
                          ", got " + py::str(values.dtype()).cast<std::string>());
  }
  const void* scale_bits = group_values(p, scales, w.scales != nullptr, count, "scales");
  const void* min_bits = group_values(p, mins, w.mins != nullptr, count,
                                      w.zero_points ? "zero_points" : "mins");
  auto* data = static_cast<uint8_t*>(p.data.get());
  void* scales_out = p.scales.get();
  void* mins_out = p.mins.get();
  const void* source = values.data();

  py::gil_scoped_release release;
  if (!bf16_bits) {
    pack_rows(w.format, w.n, w.k, w.group_size, p.gated, first, count, source, scale_bits,
              min_bits, data, scales_out, mins_out, w.wide_scales);
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
                    bool gated, const OptionalArray& zero_points, const Codebook& codebook) {
  if (values.ndim() != 2) throw py::value_error("values must have two dimensions");
  if (mins && zero_points) throw py::value_error("mins and zero_points exclude each other");
  PyPackedLinear p =
      empty(format, values.shape(0), values.shape(1), group_size, mins.has_value(), gated,
            scales && is_wide(*scales), zero_points.has_value(), codebook);
  set_rows(p, 0, values, scales, zero_points ? zero_points : mins);
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
           py::arg("mins") = py::none(), py::arg("group_size") = 0, py::arg("gated") = false,
           py::arg("zero_points") = py::none(), py::arg("codebook") = py::none())
      .def_static("empty", &empty, py::arg("format"), py::arg("n"), py::arg("k"),
                  py::arg("group_size") = 0, py::arg("mins") = false, py::arg("gated") = false,
                  py::arg("wide_scales") = false, py::arg("zero_points") = false,
                  py::arg("codebook") = py::none())
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

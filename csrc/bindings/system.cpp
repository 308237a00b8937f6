// What this build and this machine are: instruction sets, CUDA devices; block hashes.
#include <dlfcn.h>

#include <cstring>

#include "common.h"
#include "cuda/cuda_api.h"
#include "pyllmlite/isa.h"
#include "pyllmlite/peaks.h"

namespace pyllmlite::bindings {
namespace {

py::dict info() {
  py::dict d;
  d["isa"] = isa();
  d["available"] = available_isas();
  d["compiled"] = compiled_isas();
  d["num_cpus"] = num_cpus();
  d["version"] = PYLLMLITE_VERSION;
  return d;
}

double measure(const std::string& kind, ThreadPool& pool, double seconds, int64_t bytes) {
  static const std::pair<const char*, PeakKind> kinds[] = {{"read", PeakKind::READ},
                                                           {"int8", PeakKind::INT8},
                                                           {"bf16", PeakKind::BF16},
                                                           {"f32", PeakKind::F32}};
  for (const auto& [name, value] : kinds) {
    if (kind == name) return measure_peak(value, pool, seconds, bytes);
  }
  throw py::value_error("kind must be read, int8, bf16 or f32, got '" + kind + "'");
}

// Where libpyllmlite itself lies: the CUDA part lies beside it.
std::string library_folder() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&pyllmlite::num_cpus), &self) == 0 ||
      self.dli_fname == nullptr) {
    return "";
  }
  const std::string path = self.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

py::dict cuda_info() {
  py::dict result;
  py::list devices;
  result["built"] = false;
  result["devices"] = devices;
  result["reason"] = py::none();
  void* library = dlopen((library_folder() + "libpyllmlite_cuda.so").c_str(), RTLD_NOW);
  if (library == nullptr) {
    result["reason"] =
        "this pyllmlite was built without its CUDA part: install it where nvcc is found, or with "
        "PYLLMLITE_CUDA=on to see why it is left out";
    return result;
  }
  result["built"] = true;
  using List = decltype(&pll_cuda_devices);
  const List list = reinterpret_cast<List>(dlsym(library, "pll_cuda_devices"));
  std::vector<pll_cuda_device> found(64);
  char error[256] = "libpyllmlite_cuda.so is damaged: it has no pll_cuda_devices";
  int32_t count = -1;
  if (list != nullptr) {
    py::gil_scoped_release release;
    count = list(found.data(), static_cast<int32_t>(found.size()), error, sizeof(error));
  }
  if (count < 0) {
    result["reason"] = std::string("no CUDA device can be used: ") + error;
    return result;
  }
  if (count == 0) result["reason"] = "no CUDA device can be used: the machine has none";
  for (int32_t i = 0; i < count && i < static_cast<int32_t>(found.size()); ++i) {
    py::dict device;
    device["name"] = found[i].name;
    device["compute_capability"] = py::make_tuple(found[i].major, found[i].minor);
    device["num_sms"] = found[i].num_sms;
    device["total_bytes"] = found[i].total_bytes;
    devices.append(device);
  }
  return result;
}

// The high and low halves of a 128-bit product, folded: a strong mix of 64 bits in two
// instructions.
uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_tokens(uint64_t parent, uint64_t salt, const int32_t* tokens, size_t count) {
  // Digits of pi: odd, and of no structure.
  constexpr uint64_t k0 = 0x243f6a8885a308d3, k1 = 0x13198a2e03707345, k2 = 0xa4093822299f31d1;
  uint64_t h = fold(parent ^ k0, fold(salt ^ k1, k2) ^ count ^ k2);
  for (size_t i = 0; i < count; i += 2) {
    const uint64_t low = static_cast<uint32_t>(tokens[i]);
    const uint64_t high = i + 1 < count ? static_cast<uint32_t>(tokens[i + 1]) : 0;
    // Multiplying by the running state alone would stick at zero.
    h = fold(h ^ k1, (low | high << 32) ^ k2) + (h << 1 | h >> 63);
  }
  return fold(h ^ k0, k1);
}

uint64_t hash_block(const py::int_& parent, const py::object& token_ids, const py::int_& salt) {
  const uint64_t parent_bits = PyLong_AsUnsignedLongLongMask(parent.ptr());
  const uint64_t salt_bits = PyLong_AsUnsignedLongLongMask(salt.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  thread_local std::vector<int32_t> tokens;
  if (py::isinstance<py::array>(token_ids)) {
    const auto array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>::ensure(
        token_ids);
    if (!array) throw py::error_already_set();
    return hash_tokens(parent_bits, salt_bits, array.data(), static_cast<size_t>(array.size()));
  }
  read_ints(token_ids, "token_ids", &tokens);
  return hash_tokens(parent_bits, salt_bits, tokens.data(), tokens.size());
}

}  // namespace

void bind_system(py::module_& m) {
  m.attr("ABI_VERSION") = PLL_ABI_VERSION;
  m.def("info", &info);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("cuda_info", &cuda_info);
  m.def("measure_peak", &measure, py::arg("kind"), py::arg("pool"), py::arg("seconds") = 0.2,
        py::arg("bytes") = 0, py::call_guard<py::gil_scoped_release>());
  m.def("hash_block", &hash_block, py::arg("parent"), py::arg("token_ids"),
        py::arg("salt") = py::int_(0));
}

}  // namespace pyllmlite::bindings

// Hands ops to Python as capsules.  A Program that takes one copies the struct, takes over the
// state and renames the capsule; until then both are the capsule's to free.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops.h"

namespace py = pybind11;

namespace {

py::capsule capsule(const pll_op& op) {
  return py::capsule(new pll_op(op), PLL_OP_CAPSULE, [](PyObject* object) {
    const char* name = PyCapsule_GetName(object);
    auto* op = static_cast<pll_op*>(PyCapsule_GetPointer(object, name));
    if (PyCapsule_IsValid(object, PLL_OP_CAPSULE) && op->destroy != nullptr) {
      op->destroy(op->state);
    }
    delete op;
  });
}

}  // namespace

PYBIND11_MODULE(_ops, m) {
  m.def(
      "attention",
      [](int num_heads, int num_kv_heads, int head_dim, int block_size, int kv_group, float scale,
         int window, float softcap, std::vector<float> alibi_slopes) {
        return capsule(make_attention({num_heads, num_kv_heads, head_dim, block_size, kv_group,
                                       window, scale, softcap, std::move(alibi_slopes)}));
      },
      py::kw_only(), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
      py::arg("block_size"), py::arg("kv_group"), py::arg("scale"), py::arg("window") = 0,
      py::arg("softcap") = 0.0f, py::arg("alibi_slopes") = std::vector<float>());
  m.def("copy", [] { return capsule(make_copy()); });
}

// Factories of the built-in ops: keyword for keyword the specs of pyllmlite/ops.h.
#include <optional>

#include "weights.h"

namespace pyllmlite::bindings {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Indices = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using OptionalFloats = std::optional<Floats>;
using OptionalIndices = std::optional<Indices>;

// Collects what an op reads, and hands out the pointers to it.
class Inputs {
 public:
  const float* floats(const OptionalFloats& array, int64_t size, const char* what) {
    if (!array) return nullptr;
    check(array->size(), size, what);
    keep_.push_back(*array);
    return array->data();
  }
  const int32_t* indices(const OptionalIndices& array, int64_t size, const char* what) {
    if (!array) return nullptr;
    check(array->size(), size, what);
    keep_.push_back(*array);
    return array->data();
  }
  void keep(std::shared_ptr<void> memory) { memory_.push_back(std::move(memory)); }
  void keep(const PyPackedLinear& weight) {
    keep(weight.data);
    keep(weight.scales);
    keep(weight.mins);
  }

  // `writes`: see PyOp.
  PyOp take(pll_op op, uint32_t writes) {
    // Memory of packed weights needs no GIL, arrays do: keep_alive sees to it.
    auto memory = std::make_shared<std::vector<std::shared_ptr<void>>>(std::move(memory_));
    memory->push_back(keep_alive(std::move(keep_)));
    const std::string name = op.name == nullptr ? "op" : op.name;
    return {own_op(op, memory), name, writes};
  }

 private:
  static void check(int64_t found, int64_t size, const char* what) {
    if (found == size) return;
    throw py::value_error(std::string(what) + " has " + std::to_string(found) +
                          " elements, expected " + std::to_string(size));
  }
  std::vector<py::object> keep_;
  std::vector<std::shared_ptr<void>> memory_;
};

struct NormArgs {
  Norm kind;
  float eps;
  OptionalFloats weight;
  OptionalFloats bias;

  NormSpec spec(int64_t width, Inputs* inputs) const {
    NormSpec spec;
    spec.kind = kind;
    spec.eps = eps;
    spec.weight = inputs->floats(weight, width, "the norm's weight");
    spec.bias = inputs->floats(bias, width, "the norm's bias");
    return spec;
  }
};

NormArgs norm_args(const std::string& kind, float eps, OptionalFloats weight,
                   OptionalFloats bias) {
  Norm value;
  if (kind == "none") {
    value = Norm::NONE;
  } else if (kind == "rms") {
    value = Norm::RMS;
  } else if (kind == "layer") {
    value = Norm::LAYER;
  } else {
    throw py::value_error("unknown norm '" + kind + "'; known: none, rms, layer");
  }
  if (!(eps >= 0)) throw py::value_error("eps must be at least 0");
  return {value, eps, std::move(weight), std::move(bias)};
}

Activation activation_from_name(const std::string& name) {
  if (name == "none") return Activation::NONE;
  if (name == "silu") return Activation::SILU;
  if (name == "gelu") return Activation::GELU;
  if (name == "gelu_tanh") return Activation::GELU_TANH;
  if (name == "relu") return Activation::RELU;
  throw py::value_error("unknown activation '" + name +
                        "'; known: none, silu, gelu, gelu_tanh, relu");
}

KVLayout kv_layout(const std::string& dtype, int32_t num_blocks, int32_t num_kv_heads,
                   int32_t head_dim, int32_t block_size) {
  KVLayout layout;
  layout.dtype = dtype_from_name(dtype);
  if (layout.dtype != PLL_F32 && layout.dtype != PLL_BF16 && layout.dtype != PLL_I8) {
    throw py::value_error("the built-in caches keep f32, bf16 or int8, not " + dtype);
  }
  if (num_blocks < 1 || num_kv_heads < 1 || head_dim < 1) {
    throw py::value_error("num_blocks, num_kv_heads and head_dim must be at least 1");
  }
  if (block_size < 16 || block_size % 16 != 0) {
    throw py::value_error("block_size must be a multiple of 16, got " +
                          std::to_string(block_size));
  }
  layout.num_blocks = num_blocks;
  layout.num_kv_heads = num_kv_heads;
  layout.head_dim = head_dim;
  layout.block_size = block_size;
  return layout;
}

void check_heads(int32_t num_heads, const KVLayout& kv, int32_t kv_group) {
  if (num_heads < 1 || num_heads % kv.num_kv_heads != 0) {
    throw py::value_error("num_heads (" + std::to_string(num_heads) +
                          ") must be a multiple of num_kv_heads (" +
                          std::to_string(kv.num_kv_heads) + ")");
  }
  if (kv_group < 0) throw py::value_error("kv_group must be at least 0");
}

struct Tables {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t num_positions = 0;
};

// Of the rotation, checked; empty without one.
Tables rotary_tables(int32_t rotary_dim, const OptionalFloats& cos, const OptionalFloats& sin,
                     const KVLayout& kv, Inputs* inputs) {
  if (rotary_dim < 0 || rotary_dim > kv.head_dim || rotary_dim % 2 != 0) {
    throw py::value_error("rotary_dim must be even and in [0, head_dim], got " +
                          std::to_string(rotary_dim));
  }
  Tables tables;
  if (rotary_dim == 0) return tables;
  if (!cos || !sin || cos->ndim() != 2) {
    throw py::value_error("rotary_dim > 0 needs cos and sin [positions, rotary_dim / 2]");
  }
  tables.num_positions = cos->shape(0);
  tables.cos = inputs->floats(cos, tables.num_positions * (rotary_dim / 2), "cos");
  tables.sin = inputs->floats(sin, tables.num_positions * (rotary_dim / 2), "sin");
  return tables;
}

PyOp linear(const PyPackedLinear& weight, const std::optional<NormArgs>& norm,
            const OptionalIndices& input_permutation, const OptionalFloats& input_scale,
            bool int8_activations, int64_t activation_group, const OptionalFloats& bias,
            const std::string& activation, bool gated, bool residual, bool logit_rows,
            float softcap, float output_scale, bool multiply, float outlier_threshold,
            bool bf16_activations) {
  const int64_t n = weight.weight.n, k = weight.weight.k;
  if (gated != weight.gated) {
    throw py::value_error(gated ? "a gated linear needs a weight that was packed with gated=True"
                                : "this weight was packed with gated=True");
  }
  if (activation_group < 0) throw py::value_error("activation_group must be at least 0");
  if (residual && multiply) throw py::value_error("residual and multiply exclude each other");
  Inputs inputs;
  LinearSpec spec;
  spec.weight = weight.weight;
  inputs.keep(weight);
  if (norm) spec.norm = norm->spec(k, &inputs);
  spec.input_permutation = inputs.indices(input_permutation, k, "input_permutation");
  if (spec.input_permutation != nullptr) {
    for (int64_t i = 0; i < k; ++i) {
      if (spec.input_permutation[i] < 0 || spec.input_permutation[i] >= k) {
        throw py::value_error("input_permutation names column " +
                              std::to_string(spec.input_permutation[i]) + " of " +
                              std::to_string(k));
      }
    }
  }
  spec.input_scale = inputs.floats(input_scale, k, "input_scale");
  spec.int8_activations = int8_activations;
  spec.activation_group = activation_group;
  spec.bf16_activations = bf16_activations;
  spec.bias = inputs.floats(bias, n, "bias");
  spec.activation = activation_from_name(activation);
  spec.gated = gated;
  spec.residual = residual;
  spec.multiply = multiply;
  spec.outlier_threshold = outlier_threshold;
  spec.logit_rows = logit_rows;
  spec.softcap = softcap;
  spec.output_scale = output_scale;
  return inputs.take(make_linear(spec), 1u << 1);
}

PyOp norm(const NormArgs& norm, int64_t width, bool residual) {
  if (width < 1) throw py::value_error("width must be at least 1");
  Inputs inputs;
  NormOpSpec spec;
  spec.norm = norm.spec(width, &inputs);
  spec.width = width;
  spec.residual = residual;
  return inputs.take(make_norm(spec), 1u << 1);
}

PyOp embed(const PyPackedLinear& table, float scale, const OptionalFloats& position_table,
           int64_t position_offset) {
  if (table.gated) throw py::value_error("an embedding table cannot be gated");
  Inputs inputs;
  EmbedSpec spec;
  spec.table = table.weight;
  inputs.keep(table);
  spec.scale = scale;
  if (position_table) {
    if (position_table->ndim() != 2 || position_table->shape(1) != table.weight.k) {
      throw py::value_error("position_table must have shape [positions, " +
                            std::to_string(table.weight.k) + "]");
    }
    if (position_offset < 0) throw py::value_error("position_offset must be at least 0");
    spec.position_table = inputs.floats(position_table, position_table->size(), "position_table");
    spec.num_positions = position_table->shape(0);
    spec.position_offset = position_offset;
  }
  return inputs.take(make_embed(spec), 1u << 0);
}

PyOp rotary_store(int32_t num_heads, const KVLayout& kv, int32_t kv_group, int32_t rotary_dim,
                  const OptionalFloats& cos, const OptionalFloats& sin,
                  const OptionalFloats& q_norm, const OptionalFloats& k_norm, float qk_norm_eps) {
  check_heads(num_heads, kv, kv_group);
  Inputs inputs;
  RotaryStoreSpec spec;
  spec.num_heads = num_heads;
  spec.kv = kv;
  spec.kv_group = kv_group;
  spec.rotary_dim = rotary_dim;
  const Tables tables = rotary_tables(rotary_dim, cos, sin, kv, &inputs);
  spec.cos = tables.cos;
  spec.sin = tables.sin;
  spec.num_positions = tables.num_positions;
  spec.q_norm = inputs.floats(q_norm, kv.head_dim, "q_norm");
  spec.k_norm = inputs.floats(k_norm, kv.head_dim, "k_norm");
  spec.qk_norm_eps = qk_norm_eps;
  return inputs.take(make_rotary_store(spec), 1u << 0 | 1u << 1 | 1u << 2 | 1u << 3);
}

PyOp attention(int32_t num_heads, const KVLayout& kv, int32_t kv_group, float scale,
               int32_t window, float softcap, const OptionalFloats& alibi_slopes, int32_t sinks,
               int32_t rotary_dim, const OptionalFloats& cos, const OptionalFloats& sin) {
  check_heads(num_heads, kv, kv_group);
  if (window < 0) throw py::value_error("window must be at least 0");
  if (sinks < 0 || sinks > 256) {
    throw py::value_error("sinks must be in [0, 256], got " + std::to_string(sinks));
  }
  if (sinks > 0 && window == 0) throw py::value_error("sinks need a window");
  Inputs inputs;
  AttentionSpec spec;
  spec.num_heads = num_heads;
  spec.kv = kv;
  spec.kv_group = kv_group;
  spec.scale = scale;
  spec.window = window;
  spec.softcap = softcap;
  spec.alibi_slopes = inputs.floats(alibi_slopes, num_heads, "alibi_slopes");
  spec.sinks = sinks;
  const Tables tables = rotary_tables(rotary_dim, cos, sin, kv, &inputs);
  spec.rotary_dim = rotary_dim;
  spec.cos = tables.cos;
  spec.sin = tables.sin;
  spec.num_positions = tables.num_positions;
  return inputs.take(make_attention(spec), 1u << 1);
}

PyOp sample(int64_t vocab_size) {
  if (vocab_size < 1) throw py::value_error("vocab_size must be at least 1");
  return Inputs().take(make_sample(vocab_size), 0);
}

PyOp copy_blocks(int32_t kv_group, bool swaps) {
  if (kv_group < 0) throw py::value_error("kv_group must be at least 0");
  return Inputs().take(make_copy_blocks(kv_group, swaps), ~0u);
}

}  // namespace

void bind_ops(py::module_& m) {
  const py::none none;
  py::class_<NormArgs>(m, "NormArgs")
      .def(py::init(&norm_args), py::arg("kind") = "none", py::arg("eps") = 1e-5f,
           py::arg("weight") = none, py::arg("bias") = none);
  py::class_<KVLayout>(m, "KVLayout")
      .def(py::init(&kv_layout), py::arg("dtype"), py::arg("num_blocks"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("block_size"));
  m.def("linear", &linear, py::arg("weight"), py::arg("norm") = none,
        py::arg("input_permutation") = none, py::arg("input_scale") = none,
        py::arg("int8_activations") = false, py::arg("activation_group") = 0,
        py::arg("bias") = none, py::arg("activation") = "none", py::arg("gated") = false,
        py::arg("residual") = false, py::arg("logit_rows") = false, py::arg("softcap") = 0.0f,
        py::arg("output_scale") = 1.0f, py::arg("multiply") = false,
        py::arg("outlier_threshold") = 0.0f, py::arg("bf16_activations") = false);
  m.def("norm", &norm, py::arg("norm"), py::arg("width"), py::arg("residual") = false);
  m.def("embed", &embed, py::arg("table"), py::arg("scale") = 1.0f,
        py::arg("position_table") = none, py::arg("position_offset") = 0);
  m.def("rotary_store", &rotary_store, py::arg("num_heads"), py::arg("kv"),
        py::arg("kv_group") = 0, py::arg("rotary_dim") = 0, py::arg("cos") = none,
        py::arg("sin") = none, py::arg("q_norm") = none, py::arg("k_norm") = none,
        py::arg("qk_norm_eps") = 1e-6f);
  m.def("attention", &attention, py::arg("num_heads"), py::arg("kv"), py::arg("kv_group") = 0,
        py::arg("scale") = 1.0f, py::arg("window") = 0, py::arg("softcap") = 0.0f,
        py::arg("alibi_slopes") = none, py::arg("sinks") = 0, py::arg("rotary_dim") = 0,
        py::arg("cos") = none, py::arg("sin") = none);
  m.def("sample", &sample, py::arg("vocab_size"));
  m.def("copy_blocks", &copy_blocks, py::arg("kv_group"), py::arg("swaps") = false);
}

}  // namespace pyllmlite::bindings

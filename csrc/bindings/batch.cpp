#include "common.h"

#include <algorithm>

namespace pyllmlite::bindings {
namespace {

std::unique_ptr<PyBatch> make_batch(int32_t max_rows, int32_t max_model_len,
                                    int32_t max_num_tokens, int32_t max_logit_rows,
                                    int32_t vocab_size, int32_t max_logprobs,
                                    const py::sequence& kv_groups) {
  std::vector<BlockTable> tables;
  std::vector<py::object> keep;
  for (const py::handle& item : kv_groups) {
    const auto [block_size, table] = item.cast<std::pair<int32_t, py::array>>();
    if (!py::dtype::of<int32_t>().is(table.dtype()) && !table.dtype().equal(py::dtype::of<int32_t>())) {
      throw py::value_error("a block table must be an int32 array");
    }
    if (table.ndim() != 2 || !(table.flags() & py::array::c_style)) {
      throw py::value_error("a block table must be a C-contiguous array [max_rows, max_blocks]");
    }
    if (table.shape(0) < max_rows) {
      throw py::value_error("a block table has " + std::to_string(table.shape(0)) +
                            " rows, the batch needs max_rows = " + std::to_string(max_rows));
    }
    tables.push_back({block_size, static_cast<int32_t>(table.shape(1)),
                      static_cast<const int32_t*>(table.data())});
    keep.push_back(table);
  }
  return std::unique_ptr<PyBatch>(
      new PyBatch{Batch(max_rows, max_model_len, max_num_tokens, max_logit_rows, vocab_size,
                        max_logprobs, std::move(tables)),
                  std::move(keep),
                  {},
                  {}});
}

void set_sampling(PyBatch& b, int32_t row, float temperature, float top_p, float min_p,
                  int32_t top_k, float repetition_penalty, float presence_penalty,
                  float frequency_penalty, int32_t num_logprobs, const py::int_& seed,
                  int32_t prompt_len, int32_t min_len, const py::object& bias_ids,
                  const std::vector<float>& bias_values, const py::object& banned_ids,
                  bool top_of_processed) {
  pll_sampling_params params{};
  params.temperature = temperature;
  params.top_p = top_p;
  params.min_p = min_p;
  params.top_k = top_k;
  params.repetition_penalty = repetition_penalty;
  params.presence_penalty = presence_penalty;
  params.frequency_penalty = frequency_penalty;
  params.num_logprobs = num_logprobs;
  // Any int is a seed; its low 64 bits count.
  params.seed = PyLong_AsUnsignedLongLongMask(seed.ptr());
  params.prompt_len = prompt_len;
  params.min_len = min_len;
  params.top_of_processed = top_of_processed;
  read_ints(bias_ids, "bias_ids", &b.scratch[0]);
  read_ints(banned_ids, "banned_ids", &b.scratch[1]);
  b.idle().set_sampling(row, params, ints(b.scratch[0]), bias_values, ints(b.scratch[1]));
}

void set_step(PyBatch& b, const py::object& rows, const py::object& starts,
              const py::object& counts, const py::object& logits, const py::object& targets) {
  b.idle();
  b.masks.clear();
  read_ints(rows, "rows", &b.scratch[0]);
  read_ints(starts, "starts", &b.scratch[1]);
  read_ints(counts, "counts", &b.scratch[2]);
  read_ints(logits, "logits", &b.scratch[3]);
  read_ints(targets, "targets", &b.scratch[4]);
  b.idle().set_step(ints(b.scratch[0]), ints(b.scratch[1]), ints(b.scratch[2]), ints(b.scratch[3]),
                   ints(b.scratch[4]));
}

void append(PyBatch& b, const py::object& rows, const py::object& tokens,
            const py::object& positions) {
  read_ints(rows, "rows", &b.scratch[0]);
  read_ints(tokens, "tokens", &b.scratch[1]);
  read_ints(positions, "positions", &b.scratch[2]);
  b.idle().append(ints(b.scratch[0]), ints(b.scratch[1]), ints(b.scratch[2]));
}

void set_mask(PyBatch& b, int32_t logit_row, const py::object& mask) {
  if (mask.is_none()) {
    b.idle().set_mask(logit_row, nullptr, 0);
    return;
  }
  if (!py::isinstance<py::array_t<uint32_t>>(mask)) {
    throw py::value_error("a mask must be a uint32 array");
  }
  const auto array = mask.cast<py::array>();
  if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) {
    throw py::value_error("a mask must be a contiguous array of one dimension");
  }
  b.idle().set_mask(logit_row, static_cast<const uint32_t*>(array.data()),
                   static_cast<size_t>(array.size()));
  b.masks.push_back(mask);
}

void set_copies(PyBatch& b, int32_t group, const py::object& pairs) {
  std::vector<int32_t>& flat = b.scratch[0];
  std::vector<int32_t>& pair = b.scratch[1];
  flat.clear();
  for (const py::handle& item : pairs) {
    read_ints(item, "pairs", &pair);
    if (pair.size() != 2) throw py::value_error("a copy is a pair (source, destination)");
    flat.insert(flat.end(), pair.begin(), pair.end());
  }
  b.idle().set_copies(group, ints(flat));
}

py::list token_list(const PyBatch& b) {
  const int32_t count = b.batch.view().num_logit_rows;
  const int32_t* tokens = b.batch.tokens();
  py::list list(count);
  for (int32_t i = 0; i < count; ++i) {
    PyObject* value = PyLong_FromLong(tokens[i]);
    if (value == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(list.ptr(), i, value);
  }
  return list;
}

// A property: the rows in use of a result, as a read-only view kept alive by the batch.
template <class T, const T* (Batch::*Get)() const>
py::array result(py::object self) {
  const Batch& batch = self.cast<PyBatch&>().batch;
  return view_of((batch.*Get)(), {batch.view().num_logit_rows}, self, false);
}

template <class T, const T* (Batch::*Get)() const>
py::array top_result(py::object self) {
  const Batch& batch = self.cast<PyBatch&>().batch;
  return view_of((batch.*Get)(), {batch.view().num_logit_rows, batch.max_logprobs()}, self, false);
}

}  // namespace

void bind_batch(py::module_& m) {
  const py::tuple none(0);
  py::class_<PyBatch>(m, "Batch")
      .def(py::init(&make_batch), py::arg("max_rows"), py::arg("max_model_len"),
           py::arg("max_num_tokens"), py::arg("max_logit_rows"), py::arg("vocab_size"),
           py::arg("max_logprobs"), py::arg("kv_groups"))
      .def_property_readonly("token_table",
                             [](py::object self) {
                               Batch& batch = self.cast<PyBatch&>().batch;
                               return view_of(batch.token_table(),
                                              {batch.max_rows(), batch.max_model_len()}, self,
                                              true);
                             })
      .def("set_sampling", &set_sampling, py::arg("row"), py::kw_only(),
           py::arg("temperature") = 1.0f, py::arg("top_p") = 1.0f, py::arg("min_p") = 0.0f,
           py::arg("top_k") = 0, py::arg("repetition_penalty") = 1.0f,
           py::arg("presence_penalty") = 0.0f, py::arg("frequency_penalty") = 0.0f,
           py::arg("num_logprobs") = -1, py::arg("seed") = py::int_(0), py::arg("prompt_len") = 0,
           py::arg("min_len") = 0, py::arg("bias_ids") = none,
           py::arg("bias_values") = std::vector<float>(), py::arg("banned_ids") = none,
           py::arg("top_of_processed") = false)
      .def(
          "copy_row",
          [](PyBatch& b, int32_t source, int32_t target, int32_t length) {
            b.idle().copy_row(source, target, length);
          },
          py::arg("source"), py::arg("target"), py::arg("length"))
      .def("append", &append, py::arg("rows"), py::arg("tokens"), py::arg("positions"))
      .def("append_sampled", [](PyBatch& b) { b.idle().append_sampled(); })
      .def("set_step", &set_step, py::arg("rows"), py::arg("starts"), py::arg("counts"),
           py::arg("logits"), py::arg("targets") = none)
      .def(
          "score_prompt", [](PyBatch& b, int32_t index) { b.idle().score_prompt(index); },
          py::arg("index"))
      .def("set_mask", &set_mask, py::arg("logit_row"), py::arg("mask"))
      .def(
          "set_step_bias",
          [](PyBatch& b, int32_t row, const py::object& ids, const std::vector<float>& values) {
            read_ints(ids, "ids", &b.scratch[0]);
            b.idle().set_step_bias(row, ints(b.scratch[0]), values);
          },
          py::arg("row"), py::arg("ids"), py::arg("values"))
      .def(
          "want_logits", [](PyBatch& b, int32_t row) { b.idle().want_logits(row); },
          py::arg("logit_row"))
      .def("set_copies", &set_copies, py::arg("group"), py::arg("pairs"))
      .def_property_readonly("num_tokens",
                             [](const PyBatch& b) { return b.batch.view().num_tokens; })
      .def_property_readonly("num_logit_rows",
                             [](const PyBatch& b) { return b.batch.view().num_logit_rows; })
      .def_property_readonly("tokens", &result<int32_t, &Batch::tokens>)
      .def_property_readonly("token_list", &token_list)
      .def_property_readonly("logprobs", &result<float, &Batch::logprobs>)
      .def_property_readonly("ranks", &result<int32_t, &Batch::ranks>)
      .def_property_readonly("top_ids", &top_result<int32_t, &Batch::top_ids>)
      .def_property_readonly("top_logprobs", &top_result<float, &Batch::top_logprobs>)
      .def_property_readonly("status", &result<int32_t, &Batch::status>)
      .def_property_readonly("any_failed", [](const PyBatch& b) { return b.batch.any_failed(); })
      .def(
          "logits",
          [](py::object self, int32_t row) {
            const Batch& batch = self.cast<PyBatch&>().batch;
            return view_of(batch.logits(row), {batch.vocab_size()}, self, false);
          },
          py::arg("logit_row"));
}

}  // namespace pyllmlite::bindings

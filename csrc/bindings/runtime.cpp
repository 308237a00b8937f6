// ThreadPool, Op, Program, BatchView.
#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "common.h"

namespace pyllmlite::bindings {
namespace {

// What a Python op sees of the step: views into the batch, which `owner` keeps alive.
struct BatchView {
  const pll_batch* batch;
  py::object owner;

  py::array ints(const int32_t* data, int32_t size) const {
    return view_of(data, {size}, owner, false);
  }
  const pll_kv_group& group(int index) const {
    if (index < 0 || index >= batch->num_kv_groups) {
      throw py::value_error("KV group " + std::to_string(index) + " is not in [0, " +
                            std::to_string(batch->num_kv_groups) + ")");
    }
    return batch->kv_groups[index];
  }
  py::array block_table(int index) const {
    const pll_kv_group& g = group(index);
    py::array_t<int32_t> table({static_cast<py::ssize_t>(batch->num_seqs),
                                static_cast<py::ssize_t>(g.max_blocks)});
    for (int32_t i = 0; i < batch->num_seqs; ++i) {
      const int32_t* row = g.block_table + static_cast<size_t>(batch->rows[i]) * g.max_blocks;
      std::copy(row, row + g.max_blocks, table.mutable_data(i, 0));
    }
    return table;
  }
};

// Native code writes where it is told to: memory that is mapped read-only would end the process.
void check_writes(const PyOp& op, const std::string& name, size_t index, bool read_only) {
  if (read_only && (op.writes >> std::min<size_t>(index, 31) & 1) != 0) {
    throw py::value_error("op '" + name + "' writes buffer " + std::to_string(index) +
                          ", which is a read-only array");
  }
}

// While it lives nobody changes the batch, nor runs it a second time.
struct Running {
  explicit Running(PyBatch* b) : batch(b) {
    if (batch == nullptr) return;
    if (batch->running) throw std::runtime_error("a Program is already running this batch");
    batch->running = true;
  }
  ~Running() {
    if (batch != nullptr) batch->running = false;
  }
  PyBatch* batch;
};

struct PyProgram {
  PyProgram(int32_t max_num_tokens, int32_t max_logit_rows, std::shared_ptr<ThreadPool> pool)
      : program(max_num_tokens, max_logit_rows, std::move(pool)) {}

  int64_t rows(const py::object& rows) const {
    if (!py::isinstance<py::str>(rows)) {
      const int64_t count = rows.cast<int64_t>();
      if (count < 1) throw py::value_error("a buffer needs at least one row");
      return count;
    }
    const std::string word = rows.cast<std::string>();
    if (word == "tokens") return Program::kTokenRows;
    if (word == "logits") return Program::kLogitRows;
    throw py::value_error("rows must be 'tokens', 'logits' or a count, got '" + word + "'");
  }

  int add_op(const PyOp& op, const std::vector<int>& ids, const std::string& name) {
    for (size_t i = 0; i < ids.size(); ++i) check_writes(op, name, i, is_read_only(ids[i]));
    return program.add_op(op.op, ids, name);
  }

  bool is_read_only(int id) const { return read_only.count(id) != 0; }

  int add_python_op(py::object function, const std::vector<int>& ids, const std::string& name) {
    if (!PyCallable_Check(function.ptr())) {
      throw py::value_error("op '" + name + "' is not callable");
    }
    std::vector<int64_t> rows;
    for (int id : ids) rows.push_back(id < program.num_buffers() && id >= 0
                                          ? program.buffer_rows(id) : 0);
    const PyObject* callable = function.ptr();
    std::shared_ptr<void> keep = keep_alive({std::move(function)});
    return program.add_host_op(
        [this, callable, keep, rows, ids](const pll_batch& batch, const pll_tensor* buffers,
                                     int32_t num_buffers) {
          py::gil_scoped_acquire gil;
          py::tuple arguments(num_buffers + 1);
          arguments[0] = py::cast(BatchView{&batch, current_batch});
          for (int32_t i = 0; i < num_buffers; ++i) {
            const int64_t count = rows[i] == Program::kTokenRows   ? batch.num_tokens
                                  : rows[i] == Program::kLogitRows ? batch.num_logit_rows
                                                                   : buffers[i].shape[0];
            arguments[i + 1] = view_of(buffers[i], count, self, !is_read_only(ids[i]));
          }
          PyObject* result = PyObject_CallObject(const_cast<PyObject*>(callable), arguments.ptr());
          if (result == nullptr) throw py::error_already_set();
          Py_DECREF(result);
        },
        ids, name);
  }

  void run(py::handle me, py::object batch_object) {
    PyBatch& batch = batch_object.cast<PyBatch&>();
    // Set and cleared under the GIL: a second thread must not take the running one's batch away.
    if (self) throw std::runtime_error("the Program is already running a step");
    const Running running(&batch);
    struct Scope {
      PyProgram& p;
      Scope(PyProgram& program, py::object b, py::handle s) : p(program) {
        p.current_batch = std::move(b);
        p.self = s;
      }
      ~Scope() {
        p.self = py::handle();
        // Last: it may run Python code, which may run this Program.
        const py::object done = std::move(p.current_batch);
      }
    } scope(*this, std::move(batch_object), me);
    struct Copies {
      Batch& batch;
      ~Copies() { batch.clear_copies(); }
    } copies{batch.batch};
    py::gil_scoped_release release;
    program.run(batch.batch.view());
  }

  Program program;
  std::set<int> read_only;  // tensors over arrays that nobody may write
  py::object current_batch;
  py::handle self;  // valid while running
};

PyOp op_from_capsule(const py::object& object) {
  PyObject* capsule = object.ptr();
  if (!PyCapsule_IsValid(capsule, PLL_OP_CAPSULE)) {
    std::string found = "not a capsule";
    if (PyCapsule_CheckExact(capsule)) {
      const char* name = PyCapsule_GetName(capsule);
      PyErr_Clear();
      found = std::string("named '") + (name == nullptr ? "" : name) + "'";
    }
    throw py::value_error(std::string("expected a capsule named '") + PLL_OP_CAPSULE +
                          "' that no Program has taken yet; this one is " + found);
  }
  const auto* op = static_cast<const pll_op*>(PyCapsule_GetPointer(capsule, PLL_OP_CAPSULE));
  // The struct is the capsule's, which lives as long as the op; the state is ours from now on.
  OpPtr owned = own_op(*op, keep_alive({object}));
  if (PyCapsule_SetName(capsule, PLL_OP_CAPSULE_TAKEN) != 0) throw py::error_already_set();
  return {std::move(owned), op->name == nullptr ? "op" : op->name, 0};
}

// Pools of run_op, one a thread count: a micro-benchmark must not time the making of threads.
// They live until the process ends.
std::shared_ptr<ThreadPool> shared_pool(int num_threads) {
  static auto* pools = new std::map<int, std::shared_ptr<ThreadPool>>;
  std::shared_ptr<ThreadPool>& pool = (*pools)[num_threads];
  if (!pool) pool = std::make_shared<ThreadPool>(num_threads);
  return pool;
}

void run_op(const PyOp& op, const std::vector<py::array>& arrays, PyBatch* batch,
            int num_threads) {
  const py::ssize_t rows = arrays.empty() || arrays[0].ndim() == 0 ? 1 : arrays[0].shape(0);
  const int32_t num_tokens = batch != nullptr ? batch->batch.view().num_tokens
                                              : static_cast<int32_t>(rows);
  if (batch == nullptr && num_tokens == 0) return;
  // Without a batch: one sequence of as many tokens as the first array has rows, all of whose
  // logits are wanted.
  std::vector<int32_t> iota(num_tokens + 1), zeros(num_tokens + 1);
  for (int32_t i = 0; i <= num_tokens; ++i) iota[i] = i;
  const int32_t starts[2] = {0, num_tokens};
  pll_batch plain{};
  plain.struct_size = sizeof(plain);
  plain.num_tokens = plain.num_logit_rows = num_tokens;
  plain.num_seqs = 1;
  plain.token_ids = plain.seq_ids = zeros.data();
  plain.positions = plain.logit_rows = iota.data();
  plain.query_start_loc = starts;
  plain.seq_lens = starts + 1;
  plain.rows = zeros.data();
  const pll_batch& step = batch != nullptr ? batch->batch.view() : plain;

  Program program(std::max(1, step.num_tokens), std::max(1, step.num_logit_rows),
                  shared_pool(num_threads));
  std::vector<int> ids;
  for (const py::array& array : arrays) {
    check_writes(op, op.name, ids.size(), !array.writeable());
    ids.push_back(program.add_tensor("array", tensor_of(array, "", "run_op")));
  }
  program.add_op(op.op, ids, op.name);
  program.finish();
  const Running running(batch);
  py::gil_scoped_release release;
  program.run(step);
}

}  // namespace

void bind_runtime(py::module_& m) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init([](int num_threads, const py::object& affinity) {
             std::vector<int32_t> cpus;
             if (!affinity.is_none()) read_ints(affinity, "affinity", &cpus);
             return std::make_shared<ThreadPool>(num_threads,
                                                 std::vector<int>(cpus.begin(), cpus.end()));
           }),
           py::arg("num_threads"), py::arg("affinity") = py::none())
      .def_property_readonly("num_threads", &ThreadPool::num_threads);

  py::class_<PyOp>(m, "Op")
      .def_property_readonly("name", [](const PyOp& op) { return op.name; })
      .def_static("from_capsule", &op_from_capsule, py::arg("capsule"));

  py::class_<BatchView>(m, "BatchView")
      .def_property_readonly(
          "token_ids", [](const BatchView& v) { return v.ints(v.batch->token_ids, v.batch->num_tokens); })
      .def_property_readonly(
          "positions", [](const BatchView& v) { return v.ints(v.batch->positions, v.batch->num_tokens); })
      .def_property_readonly(
          "seq_ids", [](const BatchView& v) { return v.ints(v.batch->seq_ids, v.batch->num_tokens); })
      .def_property_readonly("query_start_loc",
                             [](const BatchView& v) {
                               return v.ints(v.batch->query_start_loc, v.batch->num_seqs + 1);
                             })
      .def_property_readonly(
          "seq_lens", [](const BatchView& v) { return v.ints(v.batch->seq_lens, v.batch->num_seqs); })
      .def_property_readonly(
          "rows", [](const BatchView& v) { return v.ints(v.batch->rows, v.batch->num_seqs); })
      .def_property_readonly("logit_rows",
                             [](const BatchView& v) {
                               return v.ints(v.batch->logit_rows, v.batch->num_logit_rows);
                             })
      .def("block_table", &BatchView::block_table, py::arg("group"))
      .def(
          "slot_mapping",
          [](const BatchView& v, int group) {
            return v.ints(v.group(group).slot_mapping, v.batch->num_tokens);
          },
          py::arg("group"));

  py::class_<PyProgram>(m, "Program")
      .def(py::init<int32_t, int32_t, std::shared_ptr<ThreadPool>>(), py::arg("max_num_tokens"),
           py::arg("max_logit_rows"), py::arg("pool"))
      .def(
          "add_buffer",
          [](PyProgram& p, const std::string& name, const py::object& rows, int64_t width,
             const std::string& dtype) {
            return p.program.add_buffer(name, p.rows(rows), width, dtype_from_name(dtype));
          },
          py::arg("name"), py::arg("rows"), py::arg("width"), py::arg("dtype") = "f32")
      .def(
          "add_tensor",
          [](PyProgram& p, const std::string& name, const py::array& array,
             const std::optional<std::string>& dtype) {
            const pll_tensor tensor = tensor_of(array, dtype.value_or(""), "tensor '" + name + "'");
            const int id = p.program.add_tensor(name, tensor, keep_alive({array}));
            if (!array.writeable()) p.read_only.insert(id);
            return id;
          },
          py::arg("name"), py::arg("array"), py::arg("dtype") = py::none())
      .def(
          "share_buffer",
          [](PyProgram& p, const std::string& name, int other, int64_t width) {
            return p.program.share_buffer(name, other, width);
          },
          py::arg("name"), py::arg("other"), py::arg("width"))
      .def(
          "column_view",
          [](PyProgram& p, const std::string& name, int other, int64_t first, int64_t width) {
            return p.program.column_view(name, other, first, width);
          },
          py::arg("name"), py::arg("other"), py::arg("first"), py::arg("width"))
      .def(
          "add_op", &PyProgram::add_op, py::arg("op"), py::arg("buffers"), py::arg("name"))
      .def("add_python_op", &PyProgram::add_python_op, py::arg("function"), py::arg("buffers"),
           py::arg("name"))
      .def("finish", [](PyProgram& p) { p.program.finish(); })
      .def(
          "run",
          [](py::object self, py::object batch) {
            self.cast<PyProgram&>().run(self, std::move(batch));
          },
          py::arg("batch"))
      .def(
          "buffer",
          [](py::object self, int id) {
            const PyProgram& p = self.cast<PyProgram&>();
            const pll_tensor& tensor = p.program.buffer(id);
            return view_of(tensor, tensor.ndim > 0 ? tensor.shape[0] : 1, self,
                           !p.is_read_only(id));
          },
          py::arg("id"))
      .def(
          "set_profiling", [](PyProgram& p, bool on) { p.program.set_profiling(on); },
          py::arg("on"))
      .def("profile",
           [](const PyProgram& p) {
             py::list result;
             for (const auto& op : p.program.profile()) {
               result.append(py::make_tuple(op.name, op.calls, op.seconds));
             }
             return result;
           })
      .def_property_readonly("buffer_bytes",
                             [](const PyProgram& p) { return p.program.buffer_bytes(); })
      .def_property_readonly("op_names", [](const PyProgram& p) { return p.program.op_names(); });

  m.def("run_op", &run_op, py::arg("op"), py::arg("arrays"), py::arg("batch").none(true),
        py::arg("num_threads") = 1);
}

}  // namespace pyllmlite::bindings

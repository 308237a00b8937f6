#include "pyllmlite/program.h"

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "pyllmlite/memory.h"

namespace pyllmlite {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kCounters = 4;
constexpr int64_t kMaxElements = int64_t{1} << 46;

size_t dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case PLL_F32:
    case PLL_I32:
    case PLL_U32:
      return 4;
    case PLL_BF16:
    case PLL_F16:
      return 2;
    case PLL_I8:
    case PLL_U8:
      return 1;
    case PLL_I64:
      return 8;
    default:
      throw std::invalid_argument("unknown dtype " + std::to_string(dtype));
  }
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

struct Buffer {
  std::string name;
  pll_tensor tensor;
  int64_t rows;       // as given
  int owner;          // index of the buffer whose memory this is; itself: own; -1: external
  size_t bytes = 0;   // of own memory: the largest of all its names
  size_t offset = 0;  // bytes into the owner's memory
  std::shared_ptr<void> memory;
  std::shared_ptr<void> keep;
};

struct alignas(64) Counters {
  std::atomic<int64_t> slots[kCounters];
};

struct Node {
  std::string name;
  OpPtr op;     // or
  HostOp host;  // one of the two
  std::vector<pll_tensor> buffers;
  std::vector<int> ids;
  int64_t calls = 0;
  double seconds = 0;
};

}  // namespace

OpPtr own_op(const pll_op& op, std::shared_ptr<void> keep) {
  if (op.abi_version != PLL_ABI_VERSION) {
    throw std::invalid_argument("op was built for ABI version " + std::to_string(op.abi_version) +
                                ", this pyllmlite runs version " +
                                std::to_string(PLL_ABI_VERSION) + ": rebuild the plugin");
  }
  if (op.struct_size != sizeof(pll_op)) {
    throw std::invalid_argument("op has struct_size " + std::to_string(op.struct_size) +
                                ", expected " + std::to_string(sizeof(pll_op)) +
                                ": rebuild the plugin against this pyllmlite's headers");
  }
  if (op.run == nullptr) throw std::invalid_argument("op has no run function");
  return OpPtr(new pll_op(op), [keep = std::move(keep)](const pll_op* p) {
    if (p->destroy != nullptr) p->destroy(p->state);
    delete p;
  });
}

struct Program::Impl {
  // A thread's view of the op it is in.  Padded: threads write their own all the time.
  struct alignas(64) Thread {
    pll_context context;
    Impl* impl;
    int op;
  };

  int32_t max_num_tokens;
  int32_t max_logit_rows;
  std::shared_ptr<ThreadPool> pool;
  std::vector<Buffer> buffers;
  std::vector<Node> nodes;
  bool finished = false;
  bool profiling = false;
  size_t bytes = 0;
  std::shared_ptr<void> scratch;
  std::unique_ptr<Counters[]> counters;
  std::unique_ptr<Thread[]> threads;

  std::atomic<bool> running{false};
  const pll_batch* batch = nullptr;
  // Lowest op that failed.  Threads compare it with the op whose barrier they just passed: one
  // that ran ahead and failed in the next op must not make the others leave this one.
  std::atomic<int> failed_op{INT_MAX};
  std::mutex failure_mutex;
  std::string failure;
  std::exception_ptr exception;
  Clock::time_point clock;

  static Thread& thread_of(const pll_context* context) {
    return *static_cast<Thread*>(context->impl);
  }
  static void barrier(const pll_context* context) { thread_of(context).impl->pool->barrier(); }
  static int64_t fetch_add(const pll_context* context, int32_t slot, int64_t amount) {
    Thread& thread = thread_of(context);
    return thread.impl->counters[thread.op].slots[slot & (kCounters - 1)].fetch_add(
        amount, std::memory_order_relaxed);
  }
  static void fail(const pll_context* context, const char* message) {
    Thread& thread = thread_of(context);
    thread.impl->record_failure(thread.op, message, nullptr);
  }

  void record_failure(int op, const char* message, std::exception_ptr error) {
    std::lock_guard<std::mutex> lock(failure_mutex);
    if (op >= failed_op.load(std::memory_order_relaxed)) return;
    failure = message == nullptr ? "" : message;
    exception = std::move(error);
    failed_op.store(op, std::memory_order_release);
  }

  void check_open() const {
    if (finished) throw std::invalid_argument("the Program is finished: nothing can be added");
  }

  int add_node(Node node, const std::vector<int>& ids) {
    check_open();
    for (int id : ids) {
      if (id < 0 || id >= static_cast<int>(buffers.size())) {
        throw std::invalid_argument("op '" + node.name + "' names buffer " + std::to_string(id) +
                                    ", there are " + std::to_string(buffers.size()));
      }
    }
    if (node.op && node.op->check != nullptr) {
      std::vector<pll_tensor> tensors;
      for (int id : ids) tensors.push_back(buffers[id].tensor);
      char error[512] = "";
      if (node.op->check(node.op->state, tensors.data(), static_cast<int32_t>(tensors.size()),
                         max_num_tokens, max_logit_rows, error, sizeof(error)) != 0) {
        error[sizeof(error) - 1] = '\0';
        throw std::invalid_argument("op '" + node.name + "': " + error);
      }
    }
    node.ids = ids;
    nodes.push_back(std::move(node));
    return static_cast<int>(nodes.size()) - 1;
  }

  int64_t rows_of(int64_t rows) const {
    return rows == kTokenRows ? max_num_tokens : rows == kLogitRows ? max_logit_rows : rows;
  }

  void run_host_op(Node& node, int index) {
    try {
      node.host(*batch, node.buffers.data(), static_cast<int32_t>(node.buffers.size()));
    } catch (...) {
      record_failure(index, nullptr, std::current_exception());
    }
  }

  void account(Node& node) {
    const Clock::time_point now = Clock::now();
    node.calls += 1;
    node.seconds += std::chrono::duration<double>(now - clock).count();
    clock = now;
  }

  void run_thread(int t) {
    Thread& thread = threads[t];
    const int count = static_cast<int>(nodes.size());
    for (int i = 0; i < count; ++i) {
      Node& node = nodes[i];
      thread.op = i;
      if (node.op) {
        node.op->run(node.op->state, batch, node.buffers.data(),
                     static_cast<int32_t>(node.buffers.size()), &thread.context);
      } else if (t == 0) {
        run_host_op(node, i);
      }
      // The pool's own end is the last op's barrier.
      if (i + 1 == count) break;
      pool->barrier();
      if (profiling && t == 0) account(node);
      if (failed_op.load(std::memory_order_acquire) <= i) return;
    }
  }
};

Program::Program(int32_t max_num_tokens, int32_t max_logit_rows, std::shared_ptr<ThreadPool> pool)
    : impl_(new Impl) {
  if (max_num_tokens < 1) throw std::invalid_argument("max_num_tokens must be at least 1");
  if (max_logit_rows < 1) throw std::invalid_argument("max_logit_rows must be at least 1");
  if (!pool) throw std::invalid_argument("a Program needs a thread pool");
  impl_->max_num_tokens = max_num_tokens;
  impl_->max_logit_rows = max_logit_rows;
  impl_->pool = std::move(pool);
}

Program::~Program() = default;

namespace {

// Elements from one row to the next.  Wide rows lie an odd number of cache lines apart: ops write
// and read a few columns of many rows, which fall on the same few sets of a cache where rows are a
// multiple of a large power of two apart.
int64_t row_stride(int64_t width, size_t element) {
  constexpr size_t LINE = 64, WIDE = 1024;
  const size_t bytes = static_cast<size_t>(width) * element;
  if (bytes < WIDE || bytes % (2 * LINE) != 0) return width;
  return width + static_cast<int64_t>(LINE / element);
}

}  // namespace

int Program::add_buffer(const std::string& name, int64_t rows, int64_t width, pll_dtype dtype) {
  impl_->check_open();
  const int64_t count = impl_->rows_of(rows);
  if (count < 1 || width < 1 || width > kMaxElements / count) {
    throw std::invalid_argument("buffer '" + name + "' has an impossible shape [" +
                                std::to_string(count) + ", " + std::to_string(width) + "]");
  }
  Buffer buffer;
  buffer.name = name;
  buffer.rows = rows;
  buffer.owner = static_cast<int>(impl_->buffers.size());
  const int64_t stride = row_stride(width, dtype_bytes(dtype));
  buffer.bytes = static_cast<size_t>(count * stride) * dtype_bytes(dtype);
  buffer.tensor = pll_tensor{nullptr, dtype, 2, {count, width, 1, 1}, {stride, 1, 1, 1}};
  impl_->buffers.push_back(std::move(buffer));
  return static_cast<int>(impl_->buffers.size()) - 1;
}

int Program::add_tensor(const std::string& name, const pll_tensor& tensor,
                        std::shared_ptr<void> keep) {
  impl_->check_open();
  dtype_bytes(tensor.dtype);
  if (tensor.ndim < 0 || tensor.ndim > 4) {
    throw std::invalid_argument("tensor '" + name + "' has " + std::to_string(tensor.ndim) +
                                " dimensions, at most 4 are possible");
  }
  Buffer buffer;
  buffer.name = name;
  buffer.rows = tensor.ndim > 0 ? tensor.shape[0] : 1;
  buffer.owner = -1;
  buffer.tensor = tensor;
  buffer.keep = std::move(keep);
  impl_->buffers.push_back(std::move(buffer));
  return static_cast<int>(impl_->buffers.size()) - 1;
}

int Program::share_buffer(const std::string& name, int other, int64_t width) {
  impl_->check_open();
  if (other < 0 || other >= num_buffers() || impl_->buffers[other].owner < 0) {
    throw std::invalid_argument("buffer '" + name + "' cannot share buffer " +
                                std::to_string(other) + ": it is not a buffer of this Program");
  }
  const Buffer& source = impl_->buffers[other];
  const int owner = source.owner;
  const int id = add_buffer(name, source.rows, width, static_cast<pll_dtype>(source.tensor.dtype));
  Buffer& buffer = impl_->buffers[id];
  buffer.owner = owner;
  Buffer& memory = impl_->buffers[owner];
  if (buffer.bytes > memory.bytes) memory.bytes = buffer.bytes;
  return id;
}

int Program::column_view(const std::string& name, int other, int64_t first, int64_t width) {
  impl_->check_open();
  if (other < 0 || other >= num_buffers() || impl_->buffers[other].owner < 0) {
    throw std::invalid_argument("buffer '" + name + "' cannot be a part of buffer " +
                                std::to_string(other) + ": it is not a buffer of this Program");
  }
  const Buffer& source = impl_->buffers[other];
  const int64_t columns = source.tensor.shape[1];
  if (first < 0 || width < 1 || width > columns || first > columns - width) {
    throw std::invalid_argument("buffer '" + name + "' would be columns " + std::to_string(first) +
                                " to " + std::to_string(first + width) + " of " +
                                std::to_string(columns));
  }
  Buffer buffer;
  buffer.name = name;
  buffer.rows = source.rows;
  buffer.owner = source.owner;
  buffer.offset = source.offset + static_cast<size_t>(first) * dtype_bytes(source.tensor.dtype);
  buffer.tensor = source.tensor;
  buffer.tensor.shape[1] = width;
  impl_->buffers.push_back(std::move(buffer));
  return num_buffers() - 1;
}

int Program::add_op(OpPtr op, const std::vector<int>& buffers, const std::string& name) {
  if (!op) throw std::invalid_argument("op '" + name + "' is empty");
  Node node;
  node.name = name;
  node.op = std::move(op);
  return impl_->add_node(std::move(node), buffers);
}

int Program::add_host_op(HostOp op, const std::vector<int>& buffers, const std::string& name) {
  if (!op) throw std::invalid_argument("op '" + name + "' is empty");
  Node node;
  node.name = name;
  node.host = std::move(op);
  return impl_->add_node(std::move(node), buffers);
}

void Program::finish() {
  Impl& impl = *impl_;
  impl.check_open();
  const int num_threads = impl.pool->num_threads();
  size_t scratch = 64;
  for (Node& node : impl.nodes) {
    if (!node.op || node.op->scratch_bytes == nullptr) continue;
    const size_t need = node.op->scratch_bytes(node.op->state, impl.max_num_tokens, num_threads);
    if (need > scratch) scratch = need;
  }
  scratch = round_up(scratch, 128);
  for (size_t i = 0; i < impl.buffers.size(); ++i) {
    Buffer& buffer = impl.buffers[i];
    if (buffer.owner != static_cast<int>(i)) continue;
    buffer.memory = allocate_zeroed(buffer.bytes);
    impl.bytes += buffer.bytes;
  }
  for (Buffer& buffer : impl.buffers) {
    if (buffer.owner < 0) continue;
    buffer.tensor.data =
        static_cast<char*>(impl.buffers[buffer.owner].memory.get()) + buffer.offset;
  }
  for (Node& node : impl.nodes) {
    for (int id : node.ids) node.buffers.push_back(impl.buffers[id].tensor);
  }
  impl.scratch = allocate_zeroed(scratch * num_threads);
  impl.bytes += scratch * num_threads;
  impl.counters.reset(new Counters[impl.nodes.size()]());
  impl.threads.reset(new Impl::Thread[num_threads]());
  for (int t = 0; t < num_threads; ++t) {
    Impl::Thread& thread = impl.threads[t];
    thread.impl = &impl;
    pll_context& context = thread.context;
    context.struct_size = sizeof(pll_context);
    context.thread = t;
    context.num_threads = num_threads;
    context.scratch = static_cast<char*>(impl.scratch.get()) + scratch * t;
    context.scratch_bytes = scratch;
    context.impl = &thread;
    context.barrier = &Impl::barrier;
    context.fetch_add = &Impl::fetch_add;
    context.fail = &Impl::fail;
  }
  impl.finished = true;
}

void Program::run(const pll_batch& batch) {
  Impl& impl = *impl_;
  if (!impl.finished) throw std::invalid_argument("the Program is not finished: call finish()");
  if (batch.num_tokens < 0 || batch.num_tokens > impl.max_num_tokens) {
    throw std::invalid_argument("the step has " + std::to_string(batch.num_tokens) +
                                " tokens, the Program was made for " +
                                std::to_string(impl.max_num_tokens));
  }
  if (batch.num_logit_rows < 0 || batch.num_logit_rows > impl.max_logit_rows) {
    throw std::invalid_argument("the step has " + std::to_string(batch.num_logit_rows) +
                                " logit rows, the Program was made for " +
                                std::to_string(impl.max_logit_rows));
  }
  if (impl.running.exchange(true, std::memory_order_acquire)) {
    throw std::runtime_error("the Program is already running a step");
  }
  struct Release {
    std::atomic<bool>& flag;
    ~Release() { flag.store(false, std::memory_order_release); }
  } release{impl.running};

  impl.batch = &batch;
  impl.failed_op.store(INT_MAX, std::memory_order_relaxed);
  for (size_t i = 0; i < impl.nodes.size(); ++i) {
    for (auto& slot : impl.counters[i].slots) slot.store(0, std::memory_order_relaxed);
    const Node& node = impl.nodes[i];
    if (!node.op || node.op->plan == nullptr) continue;
    char error[512] = "";
    if (node.op->plan(node.op->state, &batch, error, sizeof(error)) != 0) {
      error[sizeof(error) - 1] = '\0';
      throw std::runtime_error("op '" + node.name + "' cannot run this step: " + error);
    }
  }
  if (impl.nodes.empty()) return;
  if (impl.profiling) impl.clock = Clock::now();
  impl.pool->run([&impl](int thread) { impl.run_thread(thread); });

  const int last = static_cast<int>(impl.nodes.size()) - 1;
  const int failed = impl.failed_op.load(std::memory_order_acquire);
  if (impl.profiling && failed >= last) impl.account(impl.nodes[last]);
  if (failed == INT_MAX) return;
  if (impl.exception) std::rethrow_exception(std::exchange(impl.exception, nullptr));
  throw std::runtime_error("op '" + impl.nodes[failed].name + "' failed: " + impl.failure);
}

const pll_tensor& Program::buffer(int id) const {
  if (id < 0 || id >= num_buffers()) {
    throw std::invalid_argument("no buffer " + std::to_string(id) + ", there are " +
                                std::to_string(num_buffers()));
  }
  if (impl_->buffers[id].owner >= 0 && !impl_->finished) {
    throw std::invalid_argument("buffers are allocated by finish()");
  }
  return impl_->buffers[id].tensor;
}

int64_t Program::buffer_rows(int id) const { return impl_->buffers.at(id).rows; }
const std::string& Program::buffer_name(int id) const { return impl_->buffers.at(id).name; }
int Program::num_buffers() const { return static_cast<int>(impl_->buffers.size()); }
size_t Program::buffer_bytes() const { return impl_->bytes; }
int32_t Program::max_num_tokens() const { return impl_->max_num_tokens; }
int32_t Program::max_logit_rows() const { return impl_->max_logit_rows; }

void Program::set_profiling(bool on) {
  impl_->profiling = on;
  if (!on) return;
  for (Node& node : impl_->nodes) {
    node.calls = 0;
    node.seconds = 0;
  }
}

std::vector<Program::OpProfile> Program::profile() const {
  std::vector<OpProfile> result;
  for (const Node& node : impl_->nodes) result.push_back({node.name, node.calls, node.seconds});
  return result;
}

std::vector<std::string> Program::op_names() const {
  std::vector<std::string> names;
  for (const Node& node : impl_->nodes) names.push_back(node.name);
  return names;
}

}  // namespace pyllmlite

// The thread pool and the Program: who runs what, in which order, and what happens when an op
// fails.  Built with ThreadSanitizer too.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <stdexcept>

#include "harness.h"
#include "pyllmlite/program.h"
#include "pyllmlite/thread_pool.h"

using harness::check;
using pyllmlite::OpPtr;
using pyllmlite::own_op;
using pyllmlite::Program;
using pyllmlite::ThreadPool;

namespace {

// The message of the exception that f throws, or "" where it throws none.
template <class Error, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

void test_pool() {
  for (int n : {1, 2, 3, 8}) {
    ThreadPool pool(n);
    std::vector<int> calls(n), seen(n);
    const int rounds = n > 2 ? 200 : 2000;
    bool ordered = true;
    for (int round = 1; round <= rounds; ++round) {
      pool.run([&](int t) {
        calls[t] += 1;
        pool.barrier();
        // Plain reads of what the others wrote: the barrier must order them.
        int sum = 0;
        for (int other = 0; other < n; ++other) sum += calls[other];
        seen[t] = sum;
        pool.barrier();
      });
      for (int t = 0; t < n; ++t) ordered = ordered && seen[t] == round * n;
    }
    check(ordered, "barrier with %d threads", n);
    for (int t = 0; t < n; ++t) check(calls[t] == rounds, "thread %d of %d ran %d", t, n, calls[t]);
  }
  ThreadPool pool(2);
  std::string nested;
  pool.run([&](int t) {
    if (t == 0) nested = message_of<std::logic_error>([&] { pool.run([](int) {}); });
  });
  check(contains(nested, "inside itself"), "run inside run: %s", nested.c_str());
  check(contains(message_of<std::invalid_argument>([] { ThreadPool p(0); }), "num_threads"),
        "0 threads");
  check(contains(message_of<std::invalid_argument>([] { ThreadPool p(2, {100000}); }), "CPU"),
        "impossible CPU");
  ThreadPool pinned(3, {0});
  int sum = 0;
  std::mutex mutex;
  pinned.run([&](int t) {
    std::lock_guard<std::mutex> lock(mutex);
    sum += t;
  });
  check(sum == 3, "pinned pool");
}

void test_pool_sleeps_and_shares() {
  ThreadPool pool(3);
  int total = 0;
  std::mutex mutex;
  const auto work = [&] {
    for (int i = 0; i < 50; ++i) {
      pool.run([&](int) {
        std::lock_guard<std::mutex> lock(mutex);
        ++total;
      });
      // Longer than any spin: workers are asleep when the next job comes.
      if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  };
  std::thread other(work);
  work();
  other.join();
  check(total == 300, "two callers take turns: %d", total);
}

void test_pool_after_fork() {
#if !defined(__SANITIZE_THREAD__)
  ThreadPool pool(3);
  pool.run([](int) {});
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> sum{0};
    for (int i = 0; i < 10; ++i) pool.run([&](int t) { sum += t; });
    _exit(sum == 30 ? 7 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child's threads");
  std::atomic<int> sum{0};
  pool.run([&](int t) { sum += t; });
  check(sum == 3, "the parent's threads");
#endif
}

// An op made of a lambda.
struct TestOp {
  std::function<void(const pll_batch&, const pll_tensor*, const pll_context&)> run;
  std::function<int(char*, size_t)> plan;
  size_t scratch = 0;
  int* destroyed = nullptr;
};

OpPtr make(TestOp body) {
  pll_op op{};
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = sizeof(op);
  op.name = "test";
  op.state = new TestOp(std::move(body));
  op.scratch_bytes = [](void* state, int32_t, int32_t) {
    return static_cast<TestOp*>(state)->scratch;
  };
  op.plan = [](void* state, const pll_batch*, char* error, size_t size) {
    auto* self = static_cast<TestOp*>(state);
    return self->plan ? self->plan(error, size) : 0;
  };
  op.run = [](void* state, const pll_batch* batch, const pll_tensor* buffers, int32_t,
              const pll_context* ctx) {
    static_cast<TestOp*>(state)->run(*batch, buffers, *ctx);
  };
  op.destroy = [](void* state) {
    auto* self = static_cast<TestOp*>(state);
    if (self->destroyed != nullptr) ++*self->destroyed;
    delete self;
  };
  return own_op(op);
}

pll_batch tokens(int count) {
  pll_batch batch{};
  batch.struct_size = sizeof(batch);
  batch.num_tokens = count;
  return batch;
}

float* row(const pll_tensor& tensor, int64_t i) {
  return static_cast<float*>(tensor.data) + i * tensor.stride[0];
}

void test_program_order(int num_threads) {
  auto pool = std::make_shared<ThreadPool>(num_threads);
  Program program(64, 8, pool);
  const int a = program.add_buffer("a", Program::kTokenRows, 16);
  const int b = program.add_buffer("b", Program::kTokenRows, 16);
  const int c = program.share_buffer("c", a, 24);
  int destroyed = 0, planned = 0;
  // Rows are shared out by the counter: each is written by whoever comes first.
  TestOp fill;
  fill.destroyed = &destroyed;
  fill.scratch = 1000;
  fill.plan = [&](char*, size_t) { return ++planned, 0; };
  std::atomic<bool> scratch_good{true};
  fill.run = [&](const pll_batch& batch, const pll_tensor* buffers, const pll_context& ctx) {
    for (;;) {
      const int64_t i = ctx.fetch_add(&ctx, 1, 1);
      if (i >= batch.num_tokens) break;
      for (int64_t j = 0; j < 16; ++j) row(buffers[0], i)[j] += static_cast<float>(i);
    }
    std::memset(ctx.scratch, ctx.thread, ctx.scratch_bytes);
    ctx.barrier(&ctx);
    const uint8_t* scratch = static_cast<uint8_t*>(ctx.scratch);
    if (reinterpret_cast<uintptr_t>(scratch) % 64 != 0 || ctx.scratch_bytes < 1000 ||
        scratch[0] != ctx.thread || scratch[ctx.scratch_bytes - 1] != ctx.thread) {
      scratch_good = false;
    }
  };
  // Thread 0 sums what all wrote; the others do nothing and wait.
  TestOp sum;
  sum.destroyed = &destroyed;
  sum.run = [](const pll_batch& batch, const pll_tensor* buffers, const pll_context& ctx) {
    if (ctx.thread != 0) return;
    float total = 0;
    for (int64_t i = 0; i < batch.num_tokens; ++i) total += row(buffers[0], i)[15];
    row(buffers[1], 0)[0] = total;
  };
  program.add_op(make(fill), {a}, "fill");
  program.add_op(make(sum), {a, b}, "sum");
  int host_calls = 0;
  program.add_host_op(
      [&](const pll_batch& batch, const pll_tensor* buffers, int32_t n) {
        ++host_calls;
        check(n == 2 && row(buffers[0], 0)[0] > 0, "a host op comes after native ones");
        std::memset(buffers[1].data, 0, sizeof(float) * 16 * batch.num_tokens);
      },
      {b, a}, "host");
  check(contains(message_of<std::invalid_argument>([&] { program.run(tokens(1)); }), "finish"),
        "run before finish");
  program.finish();
  check(contains(message_of<std::invalid_argument>(
                     [&] { program.add_buffer("late", 1, 1); }), "finished"),
        "add after finish");
  check(program.buffer(a).data == program.buffer(c).data, "shared memory");
  check(program.buffer(c).shape[1] == 24, "shared width");
  program.set_profiling(true);
  const int rounds = 50;
  for (int i = 0; i < rounds; ++i) {
    const pll_batch batch = tokens(50 + i % 15);
    program.run(batch);
    const int n = batch.num_tokens;
    check(row(program.buffer(b), 0)[0] == static_cast<float>(n * (n - 1) / 2), "sum of %d", n);
  }
  check(planned == rounds && host_calls == rounds, "planned %d, host %d", planned, host_calls);
  for (const auto& op : program.profile()) {
    check(op.calls == rounds && op.seconds >= 0, "profile of %s", op.name.c_str());
  }
  check(contains(message_of<std::invalid_argument>([&] { program.run(tokens(65)); }), "65 tokens"),
        "a step that is too big");
  pll_batch wide = tokens(1);
  wide.num_logit_rows = 9;
  check(contains(message_of<std::invalid_argument>([&] { program.run(wide); }), "9 logit rows"),
        "too many logit rows");
  check(scratch_good, "scratch is aligned and one thread's own");
  check(destroyed == 0, "ops live as long as the program");
}

void test_program_failures(int num_threads) {
  auto pool = std::make_shared<ThreadPool>(num_threads);
  Program program(8, 8, pool);
  // What fails in this run: thread (or all, -1) and op.
  int failing_op = -1, failing_thread = -1;
  bool plan_fails = false, host_throws = false;
  std::vector<std::vector<int>> ran(4, std::vector<int>(num_threads));
  for (int i = 0; i < 3; ++i) {
    TestOp op;
    op.plan = [&, i](char* error, size_t size) {
      if (!plan_fails || i != 1) return 0;
      std::snprintf(error, size, "%s", std::string(2000, 'x').c_str());
      return 1;
    };
    op.run = [&, i](const pll_batch&, const pll_tensor*, const pll_context& ctx) {
      ran[i][ctx.thread] += 1;
      if (i == failing_op && (failing_thread < 0 || failing_thread == ctx.thread)) {
        ctx.fail(&ctx, "out of luck");
      }
    };
    program.add_op(make(std::move(op)), {}, "op" + std::to_string(i));
  }
  program.add_host_op(
      [&](const pll_batch&, const pll_tensor*, int32_t) {
        ran[3][0] += 1;
        if (host_throws) throw std::domain_error("from the host");
      },
      {}, "host");
  program.finish();
  const pll_batch batch = tokens(1);
  const auto sum = [&](int op) { return std::accumulate(ran[op].begin(), ran[op].end(), 0); };
  const auto reset = [&] {
    for (auto& counts : ran) std::fill(counts.begin(), counts.end(), 0);
  };
  for (int round = 0; round < 100; ++round) {
    for (failing_op = 0; failing_op < 3; ++failing_op) {
      failing_thread = round % (num_threads + 1) - 1;
      reset();
      const std::string error = message_of<std::runtime_error>([&] { program.run(batch); });
      check(error == "op 'op" + std::to_string(failing_op) + "' failed: out of luck", "%s",
            error.c_str());
      for (int i = 0; i < 4; ++i) {
        const int expected = i > failing_op ? 0 : i == 3 ? 1 : num_threads;
        check(sum(i) == expected, "op %d ran %d times, failing %d", i, sum(i), failing_op);
      }
    }
    failing_op = -1;
    host_throws = round % 2 == 1;
    const std::string error = message_of<std::domain_error>([&] { program.run(batch); });
    check(error == (host_throws ? "from the host" : ""), "host op: %s", error.c_str());
    host_throws = false;
    reset();
    check(message_of<std::exception>([&] { program.run(batch); }).empty(), "runs again");
    check(sum(2) == num_threads && sum(3) == 1, "runs whole again");
  }
  plan_fails = true;
  reset();
  const std::string error = message_of<std::runtime_error>([&] { program.run(batch); });
  check(contains(error, "op 'op1' cannot run this step: xxx") && error.size() < 600, "%s",
        error.c_str());
  check(sum(0) == 0, "nothing runs when a plan fails");
}

void test_ownership() {
  int destroyed = 0;
  TestOp body;
  body.run = [](const pll_batch&, const pll_tensor*, const pll_context&) {};
  body.destroyed = &destroyed;
  {
    OpPtr op = make(body);
    auto pool = std::make_shared<ThreadPool>(1);
    auto program = std::make_unique<Program>(1, 1, pool);
    program->add_op(op, {}, "a");
    program->add_op(op, {}, "twice");
    program->finish();
    program->run(tokens(1));
    program.reset();
    check(destroyed == 0, "the op has another owner");
  }
  check(destroyed == 1, "destroyed %d times", destroyed);

  pll_op op{};
  op.abi_version = PLL_ABI_VERSION + 1;
  op.struct_size = sizeof(op);
  check(contains(message_of<std::invalid_argument>([&] { own_op(op); }), "ABI version"), "version");
  op.abi_version = PLL_ABI_VERSION;
  op.struct_size = 8;
  check(contains(message_of<std::invalid_argument>([&] { own_op(op); }), "struct_size 8"), "size");
  op.struct_size = sizeof(op);
  check(contains(message_of<std::invalid_argument>([&] { own_op(op); }), "no run"), "no run");

  Program program(4, 4, std::make_shared<ThreadPool>(1));
  for (const auto& bad : {std::pair<int64_t, int64_t>{0, 4}, {4, 0}, {-3, 4}, {1 << 30, int64_t{1} << 40}}) {
    check(contains(message_of<std::invalid_argument>(
                       [&] { program.add_buffer("b", bad.first, bad.second); }), "shape"),
          "shape [%ld, %ld]", static_cast<long>(bad.first), static_cast<long>(bad.second));
  }
  check(contains(message_of<std::invalid_argument>([&] { program.add_op(make(body), {3}, "x"); }),
                 "names buffer 3"), "unknown buffer");
  check(contains(message_of<std::invalid_argument>([&] { program.share_buffer("x", 0, 4); }),
                 "cannot share"), "unknown shared buffer");
}

}  // namespace

int main() {
  test_pool();
  test_pool_sleeps_and_shares();
  test_pool_after_fork();
  for (int n : {1, 2, 4}) {
    test_program_order(n);
    test_program_failures(n);
  }
  test_ownership();
  return harness::finish();
}

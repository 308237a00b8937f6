// A few lines of test harness: checks that count, an op run as a Program runs it, every
// instruction set of the machine.
#ifndef PYLLMLITE_TESTS_HARNESS_H
#define PYLLMLITE_TESTS_HARNESS_H

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "pyllmlite/isa.h"
#include "pyllmlite/op.h"

namespace harness {

inline int passed = 0, failed = 0;

__attribute__((format(printf, 2, 3))) inline bool check(bool good, const char* format, ...) {
  if (good) {
    ++passed;
    return true;
  }
  if (++failed <= 20) {
    va_list arguments;
    va_start(arguments, format);
    std::printf("FAILED: ");
    std::vprintf(format, arguments);
    std::printf("\n");
    va_end(arguments);
  }
  return false;
}

// main's return value.
inline int finish() {
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}

inline void for_each_isa(const std::function<void(const std::string&)>& body) {
  for (const std::string& name : pyllmlite::available_isas()) {
    pyllmlite::set_isa(name);
    body(name);
  }
}

// Deterministic on every platform (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }
  // Uniform in [-scale, scale).
  float value(float scale = 1) {
    return scale * (static_cast<float>(bits() >> 40) / 8388608.0f - 1.0f);
  }
  std::vector<float> values(size_t n, float scale = 1) {
    std::vector<float> result(n);
    for (float& x : result) x = value(scale);
    return result;
  }

 private:
  uint64_t state_;
};

inline pll_tensor tensor(void* data, int32_t dtype, int64_t rows, int64_t width) {
  pll_tensor result{};
  result.data = data;
  result.dtype = dtype;
  result.ndim = 2;
  result.shape[0] = rows;
  result.shape[1] = width;
  result.stride[0] = width;
  result.stride[1] = 1;
  return result;
}
inline pll_tensor tensor(std::vector<float>& data, int64_t width) {
  return tensor(data.data(), PLL_F32, static_cast<int64_t>(data.size()) / width, width);
}

struct Barrier {
  std::mutex mutex;
  std::condition_variable all_here;
  int count = 0, waiting = 0, round = 0;
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const int mine = round;
    if (++waiting == count) {
      waiting = 0;
      ++round;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != mine; });
    }
  }
};

struct Shared {
  Barrier barrier;
  std::atomic<int64_t> counters[4];
  std::mutex mutex;
  std::string error;
};

// Plans and runs an op once, then destroys it unless `keep`; returns the error, if any.
inline std::string run_op(pll_op op, const pll_batch& batch, std::vector<pll_tensor> buffers,
                          int threads = 1, bool keep = false) {
  int32_t max_tokens = batch.num_tokens > 0 ? batch.num_tokens : 1;
  const size_t bytes =
      (op.scratch_bytes ? op.scratch_bytes(op.state, max_tokens, threads) : 0) / 64 * 64 + 128;
  char message[256] = {};
  Shared shared;
  shared.barrier.count = threads;
  for (auto& counter : shared.counters) counter = 0;
  if (op.plan && op.plan(op.state, &batch, message, sizeof(message))) {
    shared.error = message;
  } else {
    auto work = [&](int thread) {
      char* scratch = static_cast<char*>(std::aligned_alloc(64, bytes));
      std::memset(scratch, 0xff, bytes);  // undefined contents: NaN
      pll_context ctx{};
      ctx.struct_size = sizeof(ctx);
      ctx.thread = thread;
      ctx.num_threads = threads;
      ctx.scratch = scratch;
      ctx.scratch_bytes = bytes;
      ctx.impl = &shared;
      ctx.barrier = [](const pll_context* c) { static_cast<Shared*>(c->impl)->barrier.wait(); };
      ctx.fetch_add = [](const pll_context* c, int32_t slot, int64_t amount) -> int64_t {
        return static_cast<Shared*>(c->impl)->counters[slot].fetch_add(amount);
      };
      ctx.fail = [](const pll_context* c, const char* text) {
        Shared* s = static_cast<Shared*>(c->impl);
        std::lock_guard<std::mutex> lock(s->mutex);
        s->error = text;
      };
      op.run(op.state, &batch, buffers.data(), static_cast<int32_t>(buffers.size()), &ctx);
      shared.barrier.wait();  // others may still read this thread's scratch
      std::free(scratch);
    };
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back(work, t);
    work(0);
    for (std::thread& thread : pool) thread.join();
  }
  if (!keep && op.destroy) op.destroy(op.state);
  return shared.error;
}

inline bool same_bits(const float* a, const float* b, size_t n) {
  return std::memcmp(a, b, n * sizeof(float)) == 0;
}

}  // namespace harness

#endif

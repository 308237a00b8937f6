#include "pyllmlite/peaks.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pyllmlite/memory.h"
#include "pyllmlite/thread_pool.h"

namespace pyllmlite {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kMaxSeconds = 60;
constexpr double kRoundSeconds = 0.01;
constexpr int64_t kMultiplyRounds = 1 << 14;
constexpr int64_t kLine = 64;

// Each thread's result, so that no loop can be left out; on lines of their own.
struct alignas(64) Result {
  double amount;
  uint64_t checksum;
};

// What is read, in a part for each thread.
class Memory {
 public:
  Memory(int64_t bytes, ThreadPool& pool)
      : count_(bytes / pool.num_threads() / kLine * kLine / 8),
        data_(allocate_zeroed(static_cast<size_t>(bytes))) {
    // Written first by the thread that reads it, and so close to it.
    pool.run([this](int thread) { std::fill_n(words(thread), count_, uint64_t{1}); });
  }
  uint64_t* words(int thread) const {
    return static_cast<uint64_t*>(data_.get()) + thread * count_;
  }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  std::shared_ptr<void> data_;
};

}  // namespace

double measure_peak(PeakKind kind, ThreadPool& pool, double seconds, int64_t bytes) {
  if (!(seconds > 0 && seconds <= kMaxSeconds)) {
    throw std::invalid_argument("seconds must be in (0, " + std::to_string(int(kMaxSeconds)) +
                                "], got " + std::to_string(seconds));
  }
  const bool reading = kind == PeakKind::READ;
  const int64_t least = reading ? kLine * pool.num_threads() : 0;
  const int64_t most = reading ? int64_t{1} << 46 : 0;
  if (bytes < least || bytes > most) {
    throw std::invalid_argument(
        reading ? "reading needs at least " + std::to_string(least) + " bytes, got " +
                      std::to_string(bytes)
                : "bytes is for reading alone and must be 0, got " + std::to_string(bytes));
  }
  std::unique_ptr<Memory> memory;
  if (reading) memory.reset(new Memory(bytes, pool));
  std::vector<Result> results(pool.num_threads());
  int64_t repeats = 1;
  const auto work = [&](int thread) {
    Result result{0, 0};
    for (int64_t i = 0; i < repeats; ++i) {
      if (reading) {
        result.checksum += peak_read(memory->words(thread), memory->count());
        result.amount += 8.0 * static_cast<double>(memory->count());
      } else {
        result.amount += peak_multiply(kind, kMultiplyRounds);
      }
    }
    results[thread] = result;
  };
  double best = 0;
  const Clock::time_point end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(
                         std::chrono::duration<double>(seconds));
  for (;;) {
    const Clock::time_point start = Clock::now();
    pool.run(work);
    const Clock::time_point now = Clock::now();
    const double taken = std::chrono::duration<double>(now - start).count();
    if (taken < kRoundSeconds) {  // too short to be timed
      repeats *= 2;
      continue;
    }
    double amount = 0;
    for (const Result& result : results) amount += result.amount;
    best = std::max(best, amount / taken);
    if (now >= end) return best;
  }
}

}  // namespace pyllmlite

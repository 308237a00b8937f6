// The loops that measure the machine: that they read and multiply all that they say.
#include <limits>
#include <numeric>
#include <stdexcept>

#include "harness.h"
#include "pyllmlite/peaks.h"
#include "pyllmlite/thread_pool.h"

using harness::check;
using pyllmlite::measure_peak;
using pyllmlite::PeakKind;
using pyllmlite::ThreadPool;

namespace {

void test_read(const std::string& isa) {
  harness::Random random(1);
  std::vector<uint64_t> words(1025);
  for (uint64_t& word : words) word = random.bits();
  for (int count : {0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64, 65, 127, 128, 129, 1000, 1024}) {
    for (int offset : {0, 1}) {
      const uint64_t* data = words.data() + offset;
      const uint64_t wanted = std::accumulate(data, data + count, uint64_t{0});
      const uint64_t sum = pyllmlite::peak_read(data, count);
      check(sum == wanted, "%s: the sum of %d words from %d", isa.c_str(), count, offset);
    }
  }
}

void test_multiply(const std::string& isa) {
  for (const PeakKind kind : {PeakKind::INT8, PeakKind::BF16, PeakKind::F32}) {
    const double one = pyllmlite::peak_multiply(kind, 1);
    // Lanes of 16 sums of 32 bits, each a product or, for smaller types, a few.
    check(one >= 16 && one == 16 * static_cast<int>(one / 16), "%s: kind %d: %g a round",
          isa.c_str(), static_cast<int>(kind), one);
    for (int rounds : {0, 2, 3, 1000, 1 << 16}) {
      const double sum = pyllmlite::peak_multiply(kind, rounds);
      check(sum == rounds * one, "%s: kind %d, %d rounds: %g", isa.c_str(),
            static_cast<int>(kind), rounds, sum);
    }
  }
  const double int8 = pyllmlite::peak_multiply(PeakKind::INT8, 1);
  const double f32 = pyllmlite::peak_multiply(PeakKind::F32, 1);
  check(int8 == 4 * f32, "%s: four bytes to a float: %g, %g", isa.c_str(), int8, f32);
}

void test_measure(const std::string& isa) {
  for (int threads : {1, 2}) {
    ThreadPool pool(threads);
    for (const PeakKind kind : {PeakKind::READ, PeakKind::INT8, PeakKind::BF16, PeakKind::F32}) {
      const int64_t bytes = kind == PeakKind::READ ? 100001 : 0;
      const double rate = measure_peak(kind, pool, 0.001, bytes);
      check(rate > 1e6 && rate < 1e16, "%s: kind %d: %g", isa.c_str(), static_cast<int>(kind),
            rate);
    }
  }
}

void test_refusals() {
  ThreadPool pool(2);
  const auto refused = [&](PeakKind kind, double seconds, int64_t bytes) {
    try {
      measure_peak(kind, pool, seconds, bytes);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (double seconds : {0.0, -1.0, nan, 61.0}) {
    check(refused(PeakKind::F32, seconds, 0), "%g seconds", seconds);
  }
  check(refused(PeakKind::F32, 0.01, 64), "bytes without reading");
  for (int64_t bytes : {int64_t{-1}, int64_t{0}, int64_t{127}, int64_t{1} << 47}) {
    check(refused(PeakKind::READ, 0.01, bytes), "reading %lld bytes",
          static_cast<long long>(bytes));
  }
}

}  // namespace

int main() {
  harness::for_each_isa([](const std::string& isa) {
    test_read(isa);
    test_multiply(isa);
    test_measure(isa);
  });
  test_refusals();
  return harness::finish();
}

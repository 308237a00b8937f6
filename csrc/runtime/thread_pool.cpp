#include "pyllmlite/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#endif

namespace pyllmlite {
namespace {

using std::chrono::nanoseconds;

// How long a thread spins before it sleeps.  To sleep and be woken costs tens of microseconds, in a
// virtual machine hundreds: spinning longer than about that loses more than it can win.
//
// It doubles when the wait was shorter than `most`, also where the spin had ended before, and
// halves when it was not (the thread waited for was not running).  What counts is when the gate was
// opened and not when the sleeper was woken: a thread that comes late because it slept would send
// the next one to sleep, op after op.
struct Patience {
  nanoseconds most, now;
  void was_short(bool is) {
    now = is ? std::min(now * 2, most) : std::max(now / 2, nanoseconds(4000));
  }
};
constexpr nanoseconds kBarrierSpin{100000};
// Between steps the host works for longer.
constexpr nanoseconds kJobSpin{200000};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// A counter that threads wait on: spin, then sleep.  Everything is ordered by the atomics
// alone (the futex only sleeps), so ThreadSanitizer sees the whole protocol.
class alignas(64) Gate {
 public:
  uint32_t phase() const { return phase_.load(std::memory_order_acquire); }

  void open() {
    // seq_cst on both sides: either the sleeper's count is seen here, or the new phase is
    // seen by the sleeper before it sleeps.
    phase_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    opened_.store(clock(), std::memory_order_relaxed);
    wake();
  }

  // spins: false where whoever is waited for needs this very CPU.
  void wait(uint32_t old, Patience* patience, bool spins) {
    if (phase() != old) return;
    spins = spins && patience->most.count() > 0;
    const int64_t start = spins ? clock() : 0;
    if (spins) {
      const int64_t end = start + patience->now.count();
      do {
        for (int i = 0; i < 16; ++i) {
          if (phase() != old) {
            patience->was_short(true);
            return;
          }
          pause();
        }
      } while (clock() < end);
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (phase_.load(std::memory_order_seq_cst) == old) sleep(old);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
    // An older time: the gate was opened before this thread counted as a sleeper.
    if (spins) {
      patience->was_short(opened_.load(std::memory_order_relaxed) - start <
                          patience->most.count());
    }
  }

 private:
  static int64_t clock() {
    return std::chrono::duration_cast<nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
#if defined(__linux__)
  void sleep(uint32_t old) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&phase_), FUTEX_WAIT_PRIVATE, old, nullptr,
            nullptr, 0);
  }
  void wake() {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&phase_), FUTEX_WAKE_PRIVATE, 0x7fffffff,
            nullptr, nullptr, 0);
  }
#else
  void sleep(uint32_t old) {
    std::unique_lock<std::mutex> lock(mutex_);
    condition_.wait(lock, [&] { return phase_.load(std::memory_order_seq_cst) != old; });
  }
  void wake() {
    { std::lock_guard<std::mutex> lock(mutex_); }
    condition_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable condition_;
#endif
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain word");
  std::atomic<uint32_t> phase_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<int64_t> opened_{0};  // when somebody was woken last
};

// The CPU that the calling thread runs on; -1: not known.
int this_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Counts forks seen from the child, where the pool's threads are gone.
std::atomic<uint32_t> fork_generation{0};

// A thread of a pool; padded, as each is written by its own thread.
struct alignas(64) Member {
  Patience barrier, job;
  std::atomic<int> cpu{-1};  // where it was last
};
// Of the pool that this thread is running in.
thread_local const void* running_pool = nullptr;
thread_local Member* self = nullptr;

void count_forks() {
  static const int registered = pthread_atfork(
      nullptr, nullptr, [] { fork_generation.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
}

}  // namespace

int num_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct ThreadPool::State {
  State(int num_threads, const std::vector<int>& affinity)
      : num_threads(num_threads), members(num_threads), generation(fork_generation.load(std::memory_order_relaxed)) {
    // With fewer CPUs than threads the one waited for may need this very CPU: sleep at once.
    const bool spin = num_cpus() >= num_threads;
    for (Member& member : members) {
      member.barrier.most = member.barrier.now = spin ? kBarrierSpin : nanoseconds(0);
      member.job.most = member.job.now = spin ? kJobSpin : nanoseconds(0);
    }
    threads.reserve(num_threads - 1);
    try {
      for (int t = 1; t < num_threads; ++t) threads.emplace_back([this, t] { work(t); });
    } catch (...) {
      stop();
      throw;
    }
#if defined(__linux__)
    for (int t = 1; t < num_threads && !affinity.empty(); ++t) {
      cpu_set_t set;
      CPU_ZERO(&set);
      CPU_SET(affinity[t % affinity.size()], &set);
      if (pthread_setaffinity_np(threads[t - 1].native_handle(), sizeof(set), &set) != 0) {
        stop();
        throw std::invalid_argument("cannot pin a thread to CPU " +
                                    std::to_string(affinity[t % affinity.size()]) +
                                    ": it does not exist or this process may not use it");
      }
    }
#else
    (void)affinity;
#endif
  }

  void stop() {
    stopping.store(true, std::memory_order_relaxed);
    job.open();
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  }

  void work(int thread) {
    self = &members[thread];
    for (uint32_t seen = 0;; ++seen) {
      job.wait(seen, &self->job, true);
      if (stopping.load(std::memory_order_relaxed)) return;
      function(argument, thread);
      barrier();
    }
  }

  void barrier() {
    if (num_threads == 1) return;
    self->cpu.store(this_cpu(), std::memory_order_relaxed);
    const uint32_t phase = gate.phase();
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
      arrived.store(0, std::memory_order_relaxed);
      gate.open();
    } else {
      gate.wait(phase, &self->barrier, alone());
    }
  }

  // Has the calling thread its CPU for itself, as far as this pool's threads go?
  bool alone() const {
    const int cpu = self->cpu.load(std::memory_order_relaxed);
    if (cpu < 0) return true;
    for (const Member& other : members) {
      if (&other != self && other.cpu.load(std::memory_order_relaxed) == cpu) return false;
    }
    return true;
  }

  const int num_threads;
  std::vector<Member> members;
  const uint32_t generation;
  std::vector<std::thread> threads;
  std::mutex turn;
  std::atomic<bool> stopping{false};
  void (*function)(void*, int) = nullptr;
  void* argument = nullptr;
  Gate job;
  Gate gate;
  alignas(64) std::atomic<int> arrived{0};
};

ThreadPool::ThreadPool(int num_threads, std::vector<int> affinity)
    : num_threads_(num_threads), affinity_(std::move(affinity)) {
  if (num_threads < 1 || num_threads > 1024) {
    throw std::invalid_argument("num_threads must be in [1, 1024], got " +
                                std::to_string(num_threads));
  }
#if defined(__linux__)
  for (int cpu : affinity_) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) {
      throw std::invalid_argument("affinity holds no CPU number: " + std::to_string(cpu));
    }
  }
#endif
  count_forks();
  state_ = new State(num_threads_, affinity_);
}

ThreadPool::~ThreadPool() {
  if (state_->generation != fork_generation.load(std::memory_order_relaxed)) return;
  state_->stop();
  delete state_;
}

ThreadPool::State* ThreadPool::start() {
  // The old state describes threads of the parent and may hold a lock of one of them: it is
  // left behind, never destroyed.
  state_ = new State(num_threads_, affinity_);
  return state_;
}

void ThreadPool::run(void (*function)(void*, int), void* argument) {
  if (running_pool == this) throw std::logic_error("ThreadPool::run was called inside itself");
  State* state = state_;
  if (state->generation != fork_generation.load(std::memory_order_relaxed)) state = start();
  std::lock_guard<std::mutex> lock(state->turn);
  const void* outer = std::exchange(running_pool, this);
  Member* outer_self = std::exchange(self, &state->members[0]);
  if (num_threads_ > 1) {
    state->function = function;
    state->argument = argument;
    state->job.open();
  }
  function(argument, 0);
  state->barrier();
  running_pool = outer;
  self = outer_self;
}

void ThreadPool::barrier() { state_->barrier(); }

}  // namespace pyllmlite

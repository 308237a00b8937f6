// A fixed set of threads that run one function together (single program, multiple data).
#ifndef PYLLMLITE_THREAD_POOL_H
#define PYLLMLITE_THREAD_POOL_H

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "pyllmlite/export.h"

namespace pyllmlite {

// CPUs this process may run on (its affinity mask, not the machine's size).
PLL_API int num_cpus();

// Waiting (for a job, at a barrier) spins for a bounded time and then sleeps, so a busy
// neighbour, or more threads than CPUs, costs a wake-up and not a time slice.  After fork()
// the child has none of the parent's threads: its first run() starts new ones.
class PLL_API ThreadPool {
 public:
  // affinity: CPU of each worker, reused in a circle; empty: the system's choice.  The
  // calling thread, worker 0, is never moved.  std::invalid_argument for a bad count or CPU.
  explicit ThreadPool(int num_threads, std::vector<int> affinity = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls function(argument, thread) on every thread, on the calling one as thread 0, and
  // returns when all are done.  Callers on several threads take turns; calling run from
  // inside run throws std::logic_error.  function must not throw.
  void run(void (*function)(void* argument, int thread), void* argument);

  template <class F>
  void run(F&& f) {
    using Function = std::remove_reference_t<F>;
    run([](void* argument, int thread) { (*static_cast<Function*>(argument))(thread); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  // Inside run: returns when every thread has called it.  What a thread wrote before is seen
  // by all after.
  void barrier();

 private:
  struct State;
  State* start();
  int num_threads_;
  std::vector<int> affinity_;
  State* state_;
};

}  // namespace pyllmlite

#endif

#include "pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrl {
namespace {

// The tasks of one call: threads take the next as they become free.
class Tasks {
 public:
  Tasks(int64_t count, const std::function<void(int64_t)>& task) : count_(count), task_(task) {}

  void take() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
        task_(i);
      }
    } catch (...) {
      next_.store(count_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) {
        error_ = std::current_exception();
      }
    }
  }

  // When nobody takes any more.
  void rethrow() const {
    if (error_) {
      std::rethrow_exception(error_);
    }
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& task_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Some tens of microseconds, about what a sleeping thread takes to wake: calls that follow one
// another find the workers awake.
template <class Condition>
bool spin_until(Condition condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) {
      return true;
    }
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  return false;
}

class Pool {
 public:
  void run(Tasks& tasks, int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_seats_ = threads - 1;
      hire(open_seats_);
      keep_off_this_core();
      tasks_ = &tasks;
      round_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    tasks.take();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_seats_ = 0;  // who has not woken up by now is not waited for
    }
    spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_.load(std::memory_order_relaxed) == 0; });
  }

 private:
  void hire(int wanted) {
    try {
      for (; hired_ < wanted; ++hired_) {
        std::thread(&Pool::work, this).detach();
      }
    } catch (const std::system_error&) {
      // The process may have no more threads: the work gets done with those there are.
    }
  }

#if defined(__linux__)
  // Workers may run wherever the caller may, but where it does: the kernel of a virtual machine can
  // take a core at rest for one that the host has taken away, and then queues a worker that wakes
  // up behind the caller, for milliseconds.
  void keep_off_this_core() {
    const int here = sched_getcpu();
    cpu_set_t others;
    if (here == kept_off_ || here < 0 || here >= CPU_SETSIZE ||
        sched_getaffinity(0, sizeof others, &others) != 0) {
      return;
    }
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) {
      kept_off_ = -1;  // workers stay; once the caller may go elsewhere, so may they
      return;
    }
    kept_off_ = here;
    others_ = others;
    for (const pid_t worker : workers_) {
      sched_setaffinity(worker, sizeof others_, &others_);
    }
  }

  // By the number that glibc has known for longer than the thread's handle: docs/packaging.md says
  // how old a Linux may be.
  void enlist() {
    std::lock_guard<std::mutex> lock(mutex_);
    workers_.push_back(static_cast<pid_t>(syscall(SYS_gettid)));
    if (kept_off_ >= 0) {
      sched_setaffinity(0, sizeof others_, &others_);
    }
  }
#else
  void keep_off_this_core() {}
  void enlist() {}
#endif

  void work() {
    enlist();
    uint64_t seen = 0;
    for (;;) {
      spin_until([&] { return round_.load(std::memory_order_acquire) != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
      seen = round_.load(std::memory_order_relaxed);
      if (open_seats_ == 0) {
        continue;
      }
      --open_seats_;
      running_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      tasks_->take();
      lock.lock();
      if (running_.fetch_sub(1, std::memory_order_release) == 1) {
        done_.notify_one();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
#if defined(__linux__)
  std::vector<pid_t> workers_;
  cpu_set_t others_;  // where they may run, unless kept_off_ is -1
  int kept_off_ = -1;
#endif
  int hired_ = 0;
  std::atomic<uint64_t> round_{0};
  Tasks* tasks_ = nullptr;
  int open_seats_ = 0;
  std::atomic<int> running_{0};
};

std::atomic<bool> busy{false};
Pool* pool = nullptr;  // never destroyed: workers wait inside it until the process ends

// A forked child has none of its parent's threads.
void start_over() {
  pool = new Pool;
  busy = false;
}

void start() {
  static const bool once = [] {
    start_over();
    pthread_atfork(nullptr, nullptr, start_over);
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  if (threads > 1) {
    start();
    if (!busy.exchange(true, std::memory_order_acquire)) {
      Tasks tasks(count, task);
      pool->run(tasks, threads);
      busy.store(false, std::memory_order_release);
      return tasks.rethrow();
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    task(i);
  }
}

}  // namespace fastrl

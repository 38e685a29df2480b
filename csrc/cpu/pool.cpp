#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

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

// Threads of our own.
class Pool {
 public:
  void run(Tasks& tasks, int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_seats_ = threads - 1;
      hire(open_seats_);
      tasks_ = &tasks;
      ++round_;
    }
    wake_.notify_all();
    tasks.take();
    std::unique_lock<std::mutex> lock(mutex_);
    open_seats_ = 0;  // who has not woken up by now is not waited for
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void hire(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) {
        std::thread(&Pool::work, this).detach();
      }
    } catch (const std::system_error&) {
      // The process may have no more threads: the work gets done with those there are.
    }
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (open_seats_ == 0) {
        continue;
      }
      --open_seats_;
      ++running_;
      lock.unlock();
      tasks_->take();
      lock.lock();
      if (--running_ == 0) {
        done_.notify_one();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  uint64_t round_ = 0;
  Tasks* tasks_ = nullptr;
  int open_seats_ = 0, running_ = 0;
};

// How an OpenMP runtime starts a parallel region.
using Region = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

std::atomic<bool> busy{false};
Region region = nullptr;
Pool* pool = nullptr;  // never destroyed: workers wait inside it until the process ends

// A forked child has none of its parent's threads, and GNU's OpenMP hangs there.
void start_over() {
  region = nullptr;
  pool = new Pool;
  busy = false;
}

void start() {
  static const bool once = [] {
    start_over();
    region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
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
      if (region) {
        region([](void* tasks) { static_cast<Tasks*>(tasks)->take(); }, &tasks, threads, 0);
      } else {
        pool->run(tasks, threads);
      }
      busy.store(false, std::memory_order_release);
      return tasks.rethrow();
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    task(i);
  }
}

bool borrows_threads() {
  start();
  return region != nullptr;
}

}  // namespace fastrl

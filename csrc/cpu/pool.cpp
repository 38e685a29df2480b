#include "pool.h"

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

class Pool {
 public:
  bool try_run(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
    if (busy_.exchange(true, std::memory_order_acquire)) {
      return false;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_seats_ = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
      hire(open_seats_);
      task_ = &task;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      error_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    open_seats_ = 0;  // who has not woken up by now is not waited for
    done_.wait(lock, [this] { return running_ == 0; });
    std::exception_ptr error = std::move(error_);
    lock.unlock();
    busy_.store(false, std::memory_order_release);
    if (error) {
      std::rethrow_exception(error);
    }
    return true;
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
      take_tasks();
      lock.lock();
      if (--running_ == 0) {
        done_.notify_one();
      }
    }
  }

  void take_tasks() {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
        (*task_)(i);
      }
    } catch (...) {
      next_.store(tasks_, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) {
        error_ = std::current_exception();
      }
    }
  }

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  uint64_t round_ = 0;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  int open_seats_ = 0, running_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: workers wait inside it until the process ends. A forked child has none of its
// parent's threads, so it starts over with a new one.
Pool* pool = nullptr;

Pool& the_pool() {
  static const bool once = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  static_cast<void>(once);
  return *pool;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
  if (tasks > 1 && threads > 1 && the_pool().try_run(tasks, threads, task)) {
    return;
  }
  for (int64_t i = 0; i < tasks; ++i) {
    task(i);
  }
}

}  // namespace fastrl

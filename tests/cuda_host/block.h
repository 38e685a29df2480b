// A thread block on one host thread: every CUDA thread is a fiber, and barriers switch between
// them.
//
// A barrier that can never complete (threads that diverged, a lane missing from a shuffle's mask)
// ends the process with a message instead of hanging. Between barriers fibers run in order, or in
// the opposite order with CUDA_HOST_BACKWARDS set: a missing barrier shows in one of the two.
// Fibers are announced to AddressSanitizer.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_host {

constexpr size_t kStack = 256 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;  // AddressSanitizer's
  dim3 thread;
  int index = 0;  // of the thread in its block
  bool done = false;
  const char* waits_in = "";

  int lane() const { return index % 32; }
};

struct Barrier {
  int arrived = 0;
  unsigned round = 0;
};

struct Warp {
  std::map<unsigned, Barrier> barriers;  // one for each mask in use
  unsigned char slots[32][16];           // what lanes hand to one another
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(dim3 grid, dim3 block, size_t shared) : grid(grid), size(block), shared_bytes(shared) {
    threads_ = static_cast<int>(block.x * block.y * block.z);
    fibers_ = std::vector<Fiber>(threads_);
  }

  dim3 grid, size, index;
  size_t shared_bytes;
  std::unique_ptr<unsigned char[]>
      shared;  // of its exact size, so that AddressSanitizer sees its end

  Fiber& fiber() { return fibers_[running_]; }
  Warp& warp() { return warps_[running_ / 32]; }

  void run(dim3 at, const std::function<void()>& kernel) {
    current() = this;
    index = at;
    kernel_ = &kernel;
    shared.reset(new unsigned char[shared_bytes]);
    std::memset(shared.get(), 0xff, shared_bytes);  // NaN to who reads before writing
    warps_ = std::vector<Warp>((threads_ + 31) / 32);
    all_ = Barrier();
    live_ = threads_;
    for (int i = 0; i < threads_; ++i) {
      start(i);
    }
    const bool backwards = std::getenv("CUDA_HOST_BACKWARDS") != nullptr;
    for (bool progress = true; live_ > 0; progress = progressed_) {
      if (!progress) {
        deadlock();
      }
      progressed_ = false;
      for (int i = 0; i < threads_; ++i) {
        running_ = backwards ? threads_ - 1 - i : i;
        if (!fiber().done) {
          resume(fiber());
        }
      }
    }
  }

  void sync_threads() {
    fiber().waits_in = "__syncthreads";
    const unsigned round = all_.round;
    ++all_.arrived;
    progressed_ = true;
    while (round == all_.round) {
      if (all_.arrived == live_) {  // threads that returned are not waited for
        release(all_);
      } else {
        yield();
      }
    }
  }

  void sync_warp(unsigned mask, const char* where) {
    fiber().waits_in = where;
    if (!(mask >> fiber().lane() & 1)) {
      fail("a lane calls %s with a mask that leaves it out", where);
    }
    Barrier& barrier = warp().barriers[mask];
    const unsigned round = barrier.round;
    progressed_ = true;
    if (++barrier.arrived == __builtin_popcount(mask)) {
      release(barrier);
    }
    while (round == barrier.round) {
      yield();
    }
  }

 private:
  template <class... Args>
  [[noreturn]] static void fail(const char* format, Args... args) {
    std::fprintf(stderr, "cuda_host: ");
    std::fprintf(stderr, format, args...);
    std::fprintf(stderr, "\n");
    std::abort();
  }

  void release(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.round;
    progressed_ = true;
  }

  [[noreturn]] void deadlock() {
    for (const Fiber& f : fibers_) {
      std::fprintf(stderr, "  thread %d: %s\n", f.index, f.done ? "returned" : f.waits_in);
    }
    fail("block (%u, %u, %u) waits for ever", index.x, index.y, index.z);
  }

  static void entry() {
    Block& block = *current();
    block.finish_switch(nullptr, true);
    (*block.kernel_)();
    block.fiber().done = true;
    --block.live_;
    block.progressed_ = true;
    block.leave(true);
  }

  void start(int i) {
    Fiber& f = fibers_[i];
    f.index = i;
    f.thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
    f.done = false;
    f.fake_stack = nullptr;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Block::entry, 0);
  }

  void resume(Fiber& f) {
    start_switch(&scheduler_fake_stack_, f.stack.get(), kStack);
    swapcontext(&scheduler_, &f.context);
    finish_switch(scheduler_fake_stack_, false);
  }

  void yield() { leave(false); }

  void leave(bool for_good) {
    Fiber& f = fiber();
    start_switch(for_good ? nullptr : &f.fake_stack, scheduler_stack_, scheduler_stack_size_);
    swapcontext(&f.context, &scheduler_);
    finish_switch(f.fake_stack, true);
  }

#if defined(__SANITIZE_ADDRESS__)
  static void start_switch(void** save, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(save, stack, size);
  }
  void finish_switch(void* fake_stack, bool from_scheduler) {
    const void* old = nullptr;
    size_t old_size = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &old, &old_size);
    if (from_scheduler) {
      scheduler_stack_ = old;
      scheduler_stack_size_ = old_size;
    }
  }
#else
  static void start_switch(void**, const void*, size_t) {}
  void finish_switch(void*, bool) {}
#endif

  int threads_, live_ = 0, running_ = 0;
  bool progressed_ = false;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier all_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_size_ = 0;
};

}  // namespace cuda_host

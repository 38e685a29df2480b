// Memory for one call's scratch, kept for the next call: what a decode step needs is as large as
// the allocator's threshold for handing memory back, and faulting it in again each step took a
// tenth of a small model's step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace fastrl {

class Arena {
 public:
  Arena() = default;
  ~Arena() { release(); }
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }

  // Forgets what was taken. What took several blocks gets one that holds it all.
  void reset() {
    if (blocks_.size() > 1) {
      const int64_t all = total_;
      release();
      add(all);
    }
    used_ = 0;
  }

  // Memory that lasts until reset, on a cache line; nobody clears it.
  void* take(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (blocks_.empty() || used_ + bytes > size_) {
      add(std::max(bytes, 2 * total_));
    }
    used_ += bytes;
    return blocks_.back() + used_ - bytes;
  }

 private:
  void add(int64_t bytes) {
    void* memory = std::aligned_alloc(64, bytes);
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    blocks_.push_back(static_cast<char*>(memory));
    size_ = bytes;
    total_ += bytes;
    used_ = 0;
  }

  void release() {
    for (char* block : blocks_) {
      std::free(block);
    }
    blocks_.clear();
    size_ = used_ = total_ = 0;
  }

  void swap(Arena& other) {
    std::swap(blocks_, other.blocks_);
    std::swap(size_, other.size_);
    std::swap(used_, other.used_);
    std::swap(total_, other.total_);
  }

  std::vector<char*> blocks_;
  int64_t size_ = 0, used_ = 0, total_ = 0;  // of the last block; of all
};

}  // namespace fastrl

// Memory that has just been mapped, where each page that is written first is a fault.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastrl {

// What malloc maps afresh each time, whatever a program did before; less may be memory used again.
constexpr int64_t kMappedAfresh = 32 << 20;

// Pages for [begin, end), which is about to be written and is part of an array that ends at `last`,
// in one call where writing would fault on each: that took a third longer. None where the last one
// is there: the memory was used before. Linux knows how since 5.14; where it does not, writing does
// it.
inline void make_pages(char* begin, char* end, char* last) {
#if defined(__linux__)
  constexpr int kPopulateWrite = 23;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto up = [](char* p) { return (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page; };
  const uintptr_t from = up(begin), array = reinterpret_cast<uintptr_t>(last) / page * page;
  const uintptr_t to = up(end) < array ? up(end) : array;  // no page that is not the array's alone
  unsigned char there = 0;
  if (from < to && !(mincore(reinterpret_cast<void*>(to - page), page, &there) == 0 && there & 1)) {
    static_cast<void>(madvise(reinterpret_cast<void*>(from), to - from, kPopulateWrite));
  }
#else
  static_cast<void>(begin), static_cast<void>(end), static_cast<void>(last);
#endif
}

// The same for rows [first, first + n) of `rows` of as many bytes each, where it is worth it.
inline void make_rows(void* array, int64_t rows, int64_t bytes, int64_t first, int64_t n) {
  char* const data = static_cast<char*>(array);
  if (rows * bytes >= kMappedAfresh) {
    make_pages(data + first * bytes, data + (first + n) * bytes, data + rows * bytes);
  }
}

}  // namespace fastrl

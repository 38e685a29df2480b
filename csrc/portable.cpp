// What the headers of newer compilers call, but glibc 2.28 and the libstdc++ of GCC 8 do not
// export, defined here with what those do export: so a build on a newer Linux runs on the older
// ones, too (manylinux_2_28). Weak, so that a toolchain that brings its own is not in conflict;
// hidden, so that nobody else's calls end up here. Found with objdump -T; docs/packaging.md says
// more.
#if defined(__x86_64__) && defined(__linux__)
#include <condition_variable>
#include <mutex>
#include <new>

#if defined(__GLIBC__) && defined(__GLIBCXX__)
#define PORTABLE extern "C" __attribute__((weak, visibility("hidden")))

// glibc 2.32: false is always right, it costs an atomic operation where a plain one would do.
PORTABLE char portable_single_threaded asm("__libc_single_threaded");
char portable_single_threaded = 0;

// glibc 2.29: the older one sets errno in another way.
extern "C" double older_log(double);
asm(".symver older_log, log@GLIBC_2.2.5");
PORTABLE double portable_log(double x) asm("log");
double portable_log(double x) { return older_log(x); }

// GCC 11, in every allocator.
PORTABLE void portable_bad_array() asm("_ZSt28__throw_bad_array_new_lengthv");
void portable_bad_array() { throw std::bad_array_new_length(); }

// GCC 12: before, it could not be cancelled; nobody cancels our threads.
PORTABLE void portable_wait(std::condition_variable* self, std::unique_lock<std::mutex>& lock) asm(
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");
void portable_wait(std::condition_variable* self, std::unique_lock<std::mutex>& lock) {
  pthread_cond_wait(self->native_handle(), lock.mutex()->native_handle());
}

// GCC 11, for std::exception_ptr, which is one pointer. Its copy constructor and destructor have
// always been exported: a copy that is never destroyed is one reference more.
extern "C" void copy_exception_ptr(void** to, void* const* from) asm(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy_exception_ptr(void** self) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");
PORTABLE void portable_addref(void** self) asm("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void portable_addref(void** self) {
  void* copy;
  copy_exception_ptr(&copy, self);
}
PORTABLE void portable_release(void** self) asm(
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void portable_release(void** self) {
  destroy_exception_ptr(self);
  *self = nullptr;
}
#endif
#endif

// What the static CUDA runtime takes from libpthread, libdl and librt, with the versions that it
// had there before glibc 2.34 moved it into libc (glibc.map). Linked with before the libc of a
// newer Linux and never loaded: it bears the name of libpthread, which every Linux has, and a newer
// libc still answers to the older versions. Where a name is missing here, tests/wheel_links.py
// fails.
extern "C" {
void dlclose() {}
void dlerror() {}
void dlmopen() {}
void dlopen() {}
void dlsym() {}
void dlvsym() {}
void pthread_condattr_setpshared() {}
void pthread_create() {}
void pthread_detach() {}
void pthread_getspecific() {}
void pthread_join() {}
void pthread_key_create() {}
void pthread_key_delete() {}
void pthread_kill() {}
void pthread_mutex_trylock() {}
void pthread_mutexattr_destroy() {}
void pthread_mutexattr_init() {}
void pthread_mutexattr_setpshared() {}
void pthread_mutexattr_settype() {}
void pthread_once() {}
void pthread_rwlock_destroy() {}
void pthread_rwlock_init() {}
void pthread_rwlock_rdlock() {}
void pthread_rwlock_timedrdlock() {}
void pthread_rwlock_timedwrlock() {}
void pthread_rwlock_tryrdlock() {}
void pthread_rwlock_trywrlock() {}
void pthread_rwlock_unlock() {}
void pthread_rwlock_wrlock() {}
void pthread_rwlockattr_destroy() {}
void pthread_rwlockattr_init() {}
void pthread_rwlockattr_setpshared() {}
void pthread_setspecific() {}
void pthread_spin_destroy() {}
void pthread_spin_init() {}
void pthread_spin_lock() {}
void pthread_spin_trylock() {}
void pthread_spin_unlock() {}
void sem_destroy() {}
void sem_init() {}
void sem_post() {}
void sem_timedwait() {}
void sem_trywait() {}
void sem_wait() {}
void shm_open() {}
void shm_unlink() {}
}

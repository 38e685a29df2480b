// Threads for the CPU kernels: those of the OpenMP runtime that torch has loaded, looked up in the
// process, or else our own. Threads of our own beside torch's fight for the cores, as torch's spin
// for a while after each of its ops; linking OpenMP would bring in a second runtime with the same
// effect. GNU's hangs in a forked child (a DataLoader's worker), so there they are our own.
#pragma once

#include <cstdint>
#include <functional>

namespace fastrl {

// Runs task(i) for every i in [0, count), on the caller and at most threads - 1 workers, and
// returns when all are done. Threads take the next task as they become free, so a task must not
// depend on who runs it; then results are the same for any number of threads. Calls from inside a
// task and calls that find the pool busy run on the caller alone. The first exception is thrown
// again here.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

// Whether they are the OpenMP runtime's.
bool borrows_threads();

}  // namespace fastrl

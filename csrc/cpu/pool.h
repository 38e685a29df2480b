// Threads for the CPU kernels. Not OpenMP: torch brings a libgomp of its own, two OpenMP runtimes
// in one process fight for the cores, and GNU's hangs in a forked DataLoader worker.
#pragma once

#include <cstdint>
#include <functional>

namespace fastrl {

// Runs task(i) for every i in [0, tasks), on the caller and at most threads - 1 workers, and
// returns when all are done. Threads take the next task as they become free, so a task must not
// depend on who runs it; then results are the same for any number of threads. Calls from inside a
// task and calls that find the pool busy run on the caller alone. The first exception is thrown
// again here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

}  // namespace fastrl

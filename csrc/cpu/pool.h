// Threads for the CPU kernels. Not OpenMP: GNU's hangs in a forked DataLoader worker, and a team of
// it waits at every region's end for each of its threads, so that on a machine with other work a
// backward of many regions took up to three times as long. Here whoever has not woken up in time is
// not waited for, and where the caller runs no worker does.
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

}  // namespace fastrl

"""Threads of the C++ ops: callers, forks, cores. Shown with the scans."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from gpu_proof import run_python
from test_scan import assert_same, draw, needs_cpu_kernel, run


@needs_cpu_kernel
def test_callers_in_several_threads_do_not_meet():
    case = draw(333, 1000)
    want = run("gae", case, "cpu")
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run("gae", case, "cpu"), range(40)):
            assert_same(got, want)


@needs_cpu_kernel
def test_a_forked_child_computes():
    run_python(
        "import os\n"
        "from test_scan import *\n"
        "native.threads = lambda: 2\n"
        "case = draw(333, 1000)\n"
        "want = run('gae', case, 'cpu')\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1)  # torch's own pool does not survive, as in a DataLoader\n"
        "    os._exit(0 if all(map(torch.equal, want, run('gae', case, 'cpu'))) else 7)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )


@needs_cpu_kernel
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores and Linux's affinities",
)
def test_workers_run_beside_the_caller_and_not_on_its_core():
    run_python(
        "import os, time\n"
        "from test_scan import *\n"
        "native.threads = lambda: 2\n"
        "case, allowed = draw(333, 1000), os.sched_getaffinity(0)\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "def here(): return int(open('/proc/self/stat').read().rpartition(')')[2].split()[36])\n"
        "for core in sorted(allowed)[:2]:\n"
        "    os.sched_setaffinity(0, {core})\n"
        "    run('gae', case, 'cpu')  # no other core is left: workers stay\n"
        "    os.sched_setaffinity(0, allowed)\n"
        "    core = here()\n"
        "    run('gae', case, 'cpu')\n"
        "    workers = set(os.listdir('/proc/self/task')) - before\n"
        "    [worker] = map(int, workers)\n"
        "    for _ in range(1000):  # a new worker may not have started yet\n"
        "        place = os.sched_getaffinity(worker)\n"
        "        moved = core != here()  # the caller, and then it is not said where to\n"
        "        if len(allowed - place) == 1 and (core not in place or moved): break\n"
        "        time.sleep(0.01)\n"
        "    else: raise AssertionError(f'{place} of {allowed}, called from {core}')\n"
        "assert os.sched_getaffinity(0) == allowed"
    )

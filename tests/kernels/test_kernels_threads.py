"""The thread pool, seen from Python: same numbers on any number of threads, several callers, forks."""

import multiprocessing
import os
import threading

import numpy as np
import pytest

from foldbit.kernels import layout, native


def layer(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 48, 13, 17), dtype=np.float32)
    w = layout.disk_to_kernel(layout.pack_bits(rng.random((2, 40, 3, 3, 48)) < 0.5), 48)
    scales = rng.random((2, 40, 1), dtype=np.float32), rng.random((3, 2), dtype=np.float32)

    def run(threads):
        return native.conv(x, w, *scales, padding=(1, 1), out_size=(13, 17), threads=threads)

    return run


def test_any_number_of_threads_gives_the_same_numbers():
    run = layer()
    expected = run(1)
    for threads in [2, 3, 7, 2, 40, 1]:
        np.testing.assert_array_equal(run(threads), expected)


def test_several_python_threads_at_once():
    runs = [layer(seed) for seed in range(4)]
    expected = [run(1) for run in runs]
    wrong = []

    def work(i):
        for _ in range(100):
            if not np.array_equal(runs[i](1 + i), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own():
    run = layer()
    expected = run(3)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        child = context.Process(target=lambda: os._exit(0 if np.array_equal(run(3), expected) else 1))
        child.start()
        child.join(30)
        alive = child.is_alive()
        if alive:
            child.kill()
        assert not alive and child.exitcode == 0
    np.testing.assert_array_equal(run(3), expected)

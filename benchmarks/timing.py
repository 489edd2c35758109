"""How it is timed: contenders in alternation, so that what slows the machine for a while slows all of them."""

import time
from math import ceil
from statistics import median, quantiles

import torch

# Short calls are repeated until one reading takes this long, far above what a clock and a loop cost.
CPU_READING = 1e-3
# Calls in one captured graph: launching it costs a few microseconds, shared among them.
GRAPH_CALLS = 48
# Inputs rotate through this many times the L2 cache, so that no call finds its own there.
CACHE_MULTIPLE = 4
MAX_SETS = 256


class Clock:
    """Shows the seconds measured elsewhere, such as by a GPU's events; it stands still between two readings."""

    now = 0.0


def clock():
    """pytest-benchmark's timer for all benchmarks here."""
    return Clock.now


def input_sets(device, nbytes):
    """How many sets of inputs to rotate through: on a GPU enough to leave its L2 cache."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, ceil(CACHE_MULTIPLE * cache / nbytes)))


def cpu_reading(calls):
    """A function that returns the seconds of one call. The first call warms up, and compiles what is compiled."""
    (call,) = calls
    call()
    start = time.perf_counter()
    call()
    loops = range(max(1, min(1000, round(CPU_READING / (time.perf_counter() - start)))))

    def read():
        start = time.perf_counter()
        for _ in loops:
            call()
        return (time.perf_counter() - start) / len(loops)

    return read


def cuda_reading(calls):
    """The same on a GPU: all calls captured in one graph, its replay between two events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:1] * 2:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    repeated = calls * max(1, GRAPH_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def read():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(repeated)

    return read


READINGS = {"cpu": cpu_reading, "cuda": cuda_reading}


def run(benchmark, readings, first, min_rounds, max_time):
    """Round robin over the readings, each round starting with another one; returns name -> its seconds.

    pytest-benchmark gets the times of `first`. As in its own loop, there are as many rounds as fit into `max_time`
    seconds, and `min_rounds` at least.
    """
    names, seconds = list(readings), {name: [] for name in readings}

    def round_robin():
        turn = len(seconds[first]) % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(readings[name]())
        Clock.now += seconds[first][-1]

    rounds = min_rounds
    if max_time > 0:
        start = time.perf_counter()
        for read in readings.values():
            read()
        rounds = max(rounds, int(max_time / (time.perf_counter() - start)))
    benchmark.pedantic(round_robin, rounds=min(rounds, 200))
    return seconds


def medians(seconds):
    return {name: median(values) for name, values in seconds.items()}


def spreads(seconds):
    """Interquartile range over median: how noisy the machine was."""
    if len(next(iter(seconds.values()))) < 2:
        return {}
    quarters = {name: quantiles(values, n=4) for name, values in seconds.items()}
    return {name: (q[2] - q[0]) / q[1] for name, q in quarters.items()}

"""Times contenders in turn. So other work on the machine slows all of them alike."""

import time
from math import ceil
from statistics import median, quantiles

import torch

# Short calls are repeated until one reading takes this long, which is far above the cost of the clock and the loop.
CPU_READING = 1e-3
# Calls in one captured graph. Launching a graph takes a few microseconds, which its calls share.
GRAPH_CALLS = 48
# The sets of inputs are used in turn, and are this many times as large as the L2 cache: no call finds its inputs there.
CACHE_MULTIPLE = 4
MAX_SETS = 256


class Clock:
    """A clock that is set by hand, for seconds that were measured otherwise, such as with a GPU's events."""

    now = 0.0


def clock():
    """pytest-benchmark's timer for all benchmarks here."""
    return Clock.now


def input_sets(device, nbytes):
    """The number of sets of inputs that are used in turn: on a GPU more than fit into its L2 cache."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, ceil(CACHE_MULTIPLE * cache / nbytes)))


def cpu_reading(calls):
    """A function that times one call and returns its seconds. A first call warms up, and compiles where needed."""
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
    """The same on a GPU: all calls are captured in one graph, whose replay is timed by two events."""
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
    """Take readings in rounds: each round times every contender once, and begins with another one.

    pytest-benchmark gets the times of `first`. As in its own loop, there are as many rounds as fit into `max_time`
    seconds, and at least `min_rounds`.

    Args:
        benchmark: pytest-benchmark's fixture.
        readings: {name of a contender: a function that returns its seconds}.
        first: the name of the contender whose times pytest-benchmark gets.
        min_rounds: the least number of rounds.
        max_time: seconds for all rounds.

    Returns:
        {name: its seconds in each round}.
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
    """The interquartile range divided by the median, which shows how noisy the machine was."""
    if len(next(iter(seconds.values()))) < 2:
        return {}
    quarters = {name: quantiles(values, n=4) for name, values in seconds.items()}
    return {name: (q[2] - q[0]) / q[1] for name, q in quarters.items()}

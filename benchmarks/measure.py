"""Seconds and bytes. Sides of a comparison alternate, so that a slow minute of the machine meets all of them."""

import gc
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def prepare(threads: int) -> None:
    """Call before the first parallel operation: threads inherit how the one that starts them treats denormals.

    Gradients that pass through dozens of latents of a random model end as denormal numbers, and a CPU multiplies those
    many times more slowly. A trained model has none.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def alternate(sides: dict[str, Callable], *, rounds: int, warmup: int = 1) -> dict[str, dict[str, list[float]]]:
    """Runs all sides in turn, `rounds` times after `warmup` ones.

    Returns:
        `dict`: for each side `seconds` of wall time and, if a side returns a number, its loss, `values` of it.
    """
    times = {name: {"seconds": [], "values": []} for name in sides}
    for turn in range(warmup + rounds):
        for name, run in sides.items():
            _wait()
            start = time.perf_counter()
            value = run()
            _wait()
            if turn >= warmup:
                times[name]["seconds"].append(time.perf_counter() - start)
                times[name]["values"] += [value] if isinstance(value, float) else []
    return times


def ratio(one: list[float], other: list[float]) -> float:
    """`one` over `other`: the median of the rounds' ratios if they alternated, else the ratio of the medians."""
    if len(one) == len(other):
        return statistics.median(a / b for a, b in zip(one, other))
    return statistics.median(one) / statistics.median(other)


def peak_memory(run: Callable) -> int:
    """Bytes that `run`, which frees what it makes, needs at its peak, above what was allocated before.

    Counted by torch's allocator: on CUDA its own maximum, on a CPU the profiler's record of every allocation. The
    process's resident set would depend on what malloc keeps of earlier measurements. Scratch memory inside a kernel
    is not counted.
    """
    gc.collect()  # what an earlier measurement left would be freed in this one, and counted as less than nothing
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def ceilings() -> dict[str, float]:
    """What the machine can do at best: FLOP/s of a large fp32 matrix product, and bytes/s of a matrix-vector one."""
    a, x = torch.randn(2048, 2048), torch.randn(2048, 1)
    weights = torch.randn(16384, 2048)  # 128 MiB, more than a core's own caches hold
    times = alternate({"product": lambda: a @ a, "read": lambda: weights @ x}, rounds=15, warmup=3)
    best = {name: min(t["seconds"]) for name, t in times.items()}
    return {"flops": 2 * 2048**3 / best["product"], "bytes": weights.nbytes / best["read"]}


def _wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()

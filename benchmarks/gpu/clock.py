"Clocks: of the GPU by the replay of a captured graph, and of the host by calls one after the other."

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ENOUGH = 0.1  # seconds for a time


def repeats(seconds: float) -> int:
    "Say how often to do what takes so long."
    return max(3, min(200, int(ENOUGH / max(seconds, 1e-6))))


def capture(act: Callable[[], object]) -> torch.cuda.CUDAGraph:
    "Capture a call that was warmed up, on a stream of its own as torch asks for."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            act()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    return graph


def on_gpu(act: Callable[[], object]) -> float:  # seconds
    "Time a call without its launches: a captured graph is replayed, many times without a pause."
    graph = capture(act)

    def replay(count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / count

    count = repeats(replay(3))
    return min(replay(count) for _ in range(3))


def on_host(act: Callable[[], object], device: str) -> float:  # seconds
    "Time calls one after the other, launches included."
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def together(count: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(count):
            act()
        wait()
        return (time.perf_counter() - start) / count

    return together(repeats(together(1)) if device == "cuda" else 1)


def bandwidth() -> float:  # bytes in a second
    "Measure how fast the card copies: reading and writing 1 GiB."
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / on_gpu(lambda: target.copy_(source))

"""What a cache on disk takes of memory and of time, beside one in memory.

    python benchmarks/disk.py MODEL [--context 32768] [--sparse topk:1024] [--part 0.25]
        [--weights packed] [--folder FOLDER] [--rounds 15] [--cold]

Steps of one token on caches with the same random rows, in turn in one process: in memory, on disk
with --part of those bytes as its limit, and on disk without a limit; the logits must have the same
bits. Random keys lie far from one another, so a step touches more pages than a text's would. Then
what is in memory of the limited one: its mapped pages by /proc/self/smaps, and its sketches.
--cold: the same with nothing in the system's cache of files before each step, with and without
reading ahead.
"""

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import environment

import headwise
from headwise.caches.resident import Resident
from headwise.hf import cache_nbytes, read_nbytes, use_own_layers
from headwise.hf.stock_names import CACHE, DynamicCache
from headwise.measure import interleaved, ratio


def filled(model: Any, context: int) -> Any:
    """A cache of the attached model with random rows, the same in each."""
    held = model._headwise
    cache: Any = use_own_layers(DynamicCache(config=model.config), held.choice, held.sparse)
    with torch.no_grad():
        model(torch.arange(64)[None], use_cache=True, **{CACHE: cache})
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        batch, kv_heads, length, dim = layer.keys.shape
        size = (2, batch, kv_heads, context - length, dim)
        layer.cache.append(*torch.randn(size, generator=generator).to(model.dtype))
    return cache


def mapped(folder: str) -> int:
    """Bytes of files of a folder that this process has in memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = folder in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def forget(cache: Any) -> None:
    """Have the system's cache of files hold nothing of a cache."""
    for layer in cache.layers:
        file = layer.cache._pools.file
        file.let_go()
        os.fsync(file._file)
        os.posix_fadvise(file._file, 0, 0, os.POSIX_FADV_DONTNEED)


def cold(cache: Any, step: Callable[[], Any], rounds: int) -> None:
    """Steps whose rows come from the disk, with and without reading ahead, in turn."""
    was, seconds = Resident.reads_ahead, dict[bool, list[float]]({True: [], False: []})
    for index in range(2 * rounds):
        ahead = index % 2 == 0
        Resident.reads_ahead = property(lambda self, ahead=ahead: ahead)  # type: ignore[assignment]
        forget(cache)
        began = time.perf_counter()
        step()
        seconds[ahead].append(time.perf_counter() - began)
    Resident.reads_ahead = was  # type: ignore[method-assign]
    for ahead, times in seconds.items():
        times.sort()
        how = "with" if ahead else "without"
        print(f"  cold, {how} reading ahead: {times[len(times) // 2]:.2f} s (from {times[0]:.2f})")


def main() -> None:
    """Print all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--sparse", default="topk:1024")
    parser.add_argument("--part", type=float, default=0.25)
    parser.add_argument("--weights", default="packed")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    print(environment())
    model: Any = headwise.load(arguments.model, dtype="bfloat16", weights=arguments.weights)
    model = model[0] if isinstance(model, tuple) else model
    headwise.attach(model, sparse=arguments.sparse)
    caches = {"in memory": filled(model, arguments.context)}
    whole = cache_nbytes(caches["in memory"])
    rows = sum(int(layer.cache.nbytes) for layer in caches["in memory"].layers)
    folder = tempfile.mkdtemp(dir=arguments.folder)
    limit, disk = int(arguments.part * rows), f"disk:{folder}"
    for name, most in ((f"on disk, {limit:,} bytes", limit), ("on disk", None)):
        headwise.attach(model, cache=disk, cache_limit=most, sparse=arguments.sparse)
        caches[name] = filled(model, arguments.context)
    logits = dict[str, torch.Tensor]()

    def step(name: str) -> None:
        with torch.no_grad():
            output = model(torch.tensor([[5]]), use_cache=True, **{CACHE: caches[name]})
        logits[name] = output.logits

    runs = {name: lambda name=name: step(name) for name in caches}
    for run in runs.values():
        run()
    assert all(torch.equal(each, logits["in memory"]) for each in logits.values())
    timings = interleaved(runs, rounds=arguments.rounds)
    print(f"rows of {rows:,} bytes ({whole:,} with sketches); a step reads", end=" ")
    print(f"{read_nbytes(caches['in memory']):,} bytes; logits with the same bits")
    for name, timing in timings.items():
        low, high = (1e3 * each for each in timing.quartiles)
        times = f"{1e3 * timing.median:.3g} ms ({low:.3g}-{high:.3g})"
        print(f"  {name:<32}{times}, {ratio(timings['in memory'], timing)} of in memory")
    name = next(name for name in caches if name.startswith("on disk,"))
    caches.pop("on disk")
    runs[name]()
    sketches = sum(layer.sketch.nbytes for layer in caches[name].layers)
    pages = mapped(folder)
    print(f"  {name}: {pages:,} bytes of rows are mapped and in memory, sketches take", end=" ")
    print(f"{sketches:,}: {(pages + sketches) / rows:.3f} of the rows in memory")
    if arguments.cold:
        cold(caches[name], runs[name], 3)
    Path(folder).rmdir()


if __name__ == "__main__":
    main()

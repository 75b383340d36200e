"""What a stored cache saves: a prompt read again against its cache loaded, and a chat of ten turns.

    python benchmarks/remember.py [MODEL] [--dtype bfloat16] [--context 8000] [--cache contiguous]
        [--rounds 5] [--shared] [--chat]

The tokens are of a text that is repeated. It is read once, timed, and its cache saved; then, in the
same process, with the file in the system's cache: from the call of `load_cache` to the next token's
logits, which must choose the token that the first cache gives; how far apart they are is printed.
--shared: two processes load the file, and each says what of it is its own, by /proc/self/smaps.
--chat: ten turns by `generate`, each with a question of its own, with and without `remember`; the
answers must be the same.
"""

import argparse
import copy
import multiprocessing
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from report import environment

import headwise
from headwise.hf.stock_names import CACHE
from headwise.measure.machine import read_bandwidth

TEXT = Path(__file__).parent.parent / "examples" / "orrin.txt"
QUESTIONS = (
    *("What is the text about?", "Who wrote it?", "Name a place in it.", "What was measured?"),
    *("How high was the wind?", "In which month?", "What stood on the hill?", "Who kept the book?"),
    *("What came after the storm?", "Say it all in one sentence."),
)


def tokens_of_text(tokenizer: Any, count: int) -> torch.Tensor:
    """The first tokens of the text, repeated."""
    text = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return torch.tensor((text * (count // len(text) + 1))[:count])[None]


def first_token(model: Any, cache: Any, token: torch.Tensor) -> torch.Tensor:
    """The logits after one token more."""
    with torch.no_grad():
        return model(token, use_cache=True, **{CACHE: cache}).logits[:, -1]


def read(model: Any, ids: torch.Tensor) -> Any:
    """The cache of a text, read as `headwise generate` does, 512 tokens at once."""
    cache = None
    with torch.no_grad():
        for part in ids.split(512, dim=1):
            output = model(part, use_cache=True, logits_to_keep=1, **{CACHE: cache})
            cache = output[CACHE]
    return cache


def hold(arguments: argparse.Namespace, path: str, barrier: Any, queue: Any) -> None:
    """A process that has loaded the cache and taken a step: what of the file it has in memory."""
    torch.set_num_threads(1)
    model = headwise.load(arguments.model, dtype=arguments.dtype)[0]
    headwise.attach(model, cache=arguments.cache)
    cache = headwise.load_cache(path, model)
    first_token(model, cache, torch.tensor([[5]]))
    barrier.wait()
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8").split(path)[1:]
    sizes = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0)
    for each in maps:
        for name in sizes:
            found = re.search(rf"^{name}: +(\d+) kB", each, re.MULTILINE)
            sizes[name] += int(found[1]) if found else 0
    queue.put(sizes)
    barrier.wait()


def shared(arguments: argparse.Namespace, path: str) -> None:
    """Two processes on one file."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    every = [context.Process(target=hold, args=(arguments, path, barrier, queue)) for _ in range(2)]
    for process in every:
        process.start()
    for _ in every:
        sizes = queue.get(timeout=600)
        words = ", ".join(f"{name} {size / 1024:.1f} MiB" for name, size in sizes.items())
        print(f"  a process holds of the file: {words}")
    for process in every:
        process.join()


def chat(model: Any, tokenizer: Any, arguments: argparse.Namespace, folder: str) -> None:
    """Ten turns over one text, with and without what is remembered."""
    document = tokens_of_text(tokenizer, arguments.context)[0].tolist()
    totals = {True: 0.0, False: 0.0}
    answers: dict[bool, list[list[int]]] = {True: [], False: []}
    for remember in (True, False):
        options = {"remember": folder} if remember else {}
        report = headwise.attach(model, cache=arguments.cache, **options)
        text = list(document)
        for number, question in enumerate(QUESTIONS, 1):
            text += tokenizer("\n" + question + "\n")["input_ids"]
            began = time.perf_counter()
            ids = torch.tensor([text])
            given = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
            )
            seconds = time.perf_counter() - began
            totals[remember] += seconds
            answer = given[0, len(text) :].tolist()
            answers[remember].append(answer)
            text += answer
            known = f", {report.remembered.known:,} known" if remember else ""
            print(f"  turn {number}: {ids.shape[1]:,} tokens{known}, {seconds:.2f} s")
    print(f"  ten turns: {totals[True]:.1f} s remembered, {totals[False]:.1f} s not")
    print(f"  the same answers: {answers[True] == answers[False]}")


def main() -> None:
    """Read, save, load, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--cache", default="contiguous")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--chat", action="store_true")
    arguments = parser.parse_args()
    print(environment())
    model, tokenizer = headwise.load(arguments.model, dtype=arguments.dtype)
    headwise.attach(model, cache=arguments.cache)
    bandwidth = read_bandwidth()[0]
    with tempfile.TemporaryDirectory() as folder:
        if arguments.chat:
            chat(model, tokenizer, arguments, folder)
            return
        ids = tokens_of_text(tokenizer, arguments.context)
        read(model, ids[:, :64])  # which warms up
        began = time.perf_counter()
        cache = read(model, ids)
        prefill = time.perf_counter() - began
        path = f"{folder}/cache.safetensors"
        began = time.perf_counter()
        headwise.save_cache(cache, path)
        save = time.perf_counter() - began
        token = torch.tensor([[5]])
        expected = first_token(model, copy.copy(cache), token)
        times = []
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            loaded = headwise.load_cache(path, model)
            logits = first_token(model, loaded, token)
            times.append(time.perf_counter() - began)
            assert torch.equal(logits.argmax(), expected.argmax()), "another token"
            apart = float((logits - expected).abs().max() / expected.abs().max())
        times.sort()
        size = Path(path).stat().st_size
        took = times[len(times) // 2]
        print(
            f"{arguments.model}, {arguments.dtype}, cache {arguments.cache}, "
            f"{arguments.context:,} tokens: read in {prefill:.2f} s; {size / 1e6:.0f} MB saved in "
            f"{save:.2f} s; loaded, with the first token, in {1e3 * took:.0f} ms "
            f"({1e3 * times[0]:.0f}-{1e3 * times[-1]:.0f}): {prefill / took:.0f}x; logits apart by "
            f"{apart:.0e} of the largest; a sum reads {bandwidth / 1e9:.0f} GB/s"
        )
        if arguments.shared:
            shared(arguments, path)


if __name__ == "__main__":
    main()

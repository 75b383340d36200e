"""What looking on costs: `python tests/viewing/cost.py time`, or `memory [overview]`.

A random Llama of 4 layers, width 512, 8 query heads and 2 kv heads of 64, float32. `time` runs
8,192 tokens and decodes 32, without a capture, with three rows, and with the overview as well, in
turn; seconds of CPU, since a busy machine changes those least. `memory` is the peak of the process,
everything included, for a page of 32,768 tokens.
"""

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import headwise
from headwise.generation.options import Sampling
from headwise.generation.recorder import generate
from headwise.viewing import view
from headwise.viewing.capture import Capture, Wanted
from headwise.viewing.forward_pass import run


class Numbers:
    """A tokenizer whose texts are numbers of random tokens."""

    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(1)
        return {"input_ids": torch.randint(0, 1024, (int(text),), generator=generator).tolist()}

    def decode(self, ids: list[int], **options: Any) -> str:
        return f" w{ids[0]}"


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def memory(*, overview: bool) -> None:
    began = time.perf_counter()
    seen = view(model(), Numbers(), "32768", tokens=[5, 16384, 32766, 32767], overview=overview)
    with tempfile.TemporaryDirectory() as folder:
        seen.save(Path(folder) / "view.html")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    print(f"overview={overview}: peak of the process {peak:.0f} MiB, {seconds:.0f} s")


def seconds(rounds: int = 6) -> None:
    llama, ids, new = model(), Numbers()("8192")["input_ids"], 32
    headwise.attach(llama)
    tokens: dict[str, list[int]] = {}

    def plain() -> None:
        tokens["without"] = generate(llama, ids, sampling=Sampling(max_new_tokens=new + 1)).tokens[
            :-1
        ]

    def looked(name: str, overview: bool) -> None:
        wanted = Wanted(tokens=len(ids) + new, rows=(5, 4000, 8191), overview=overview)
        tokens[name] = run(llama, ids, new, Capture(llama, wanted), "contiguous")[0]

    times: dict[str, list[float]] = {"without": [], "three rows": [], "overview": []}
    for _ in range(rounds):
        for name in times:
            began = time.process_time()
            plain() if name == "without" else looked(name, name == "overview")
            times[name].append(time.process_time() - began)
    assert tokens["without"] == tokens["three rows"] == tokens["overview"]
    for name, each in times.items():
        ratios = [one / other for one, other in zip(each[1:], times["without"][1:])]
        print(
            f"{name}: median {statistics.median(each[1:]):.2f} s, "
            f"{statistics.median(ratios):.3f} times as long"
        )


if __name__ == "__main__":
    if sys.argv[1] == "time":
        seconds()
    else:
        memory(overview="overview" in sys.argv)

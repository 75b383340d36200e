"""One decoding step of a whole model in a batch, with beams, and how its memory goes on.

    python benchmarks/decode_step.py [--model smollm2] [--dtype bfloat16] [--batch 8]

headwise against stock Transformers, each on its own copy of the model, in turn in one process: a
step of a batch with a cache of `context` tokens, and the generation of 24 tokens with three beams.
Then the memory of the process after the 3rd and the 100th of equal generations by headwise.
"""

import argparse
import copy
from typing import Any

import torch
from report import environment
from transformers.cache_utils import DynamicCache

import headwise
from headwise.hf import use_own_layers
from headwise.measure import interleaved, ratio


def resident() -> int:
    """Bytes of the process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    ours, _ = headwise.load(asked.model, dtype=asked.dtype)
    stock = copy.deepcopy(ours)
    print(*headwise.attach(ours).step, sep="\n")
    print(environment())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 5000, (asked.batch, asked.context), generator=generator)
    caches = {
        "headwise": use_own_layers(DynamicCache(config=ours.config)),
        "stock": DynamicCache(config=stock.config),
    }
    models = {"headwise": ours, "stock": stock}
    for name, model in models.items():
        model(ids, cache=caches[name], logits_to_keep=1)

    def step(name: str) -> Any:
        return models[name](ids[:, :1], cache=caches[name]).logits

    def beams(name: str) -> Any:
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "num_beams": 3}
        return models[name].generate(ids[:1], **options)

    expected, given = step("stock").float(), step("headwise").float()
    error = (given - expected).abs().max() / expected.abs().max()
    print(f"logits differ by {float(error):.1e} of the largest")
    for what, run in ((f"a step of {asked.batch}", step), ("24 tokens of three beams", beams)):
        timings = interleaved(
            {name: (lambda run=run, name=name: run(name)) for name in models}, rounds=asked.rounds
        )
        times = {name: 1e3 * timing.median for name, timing in timings.items()}
        print(
            f"{what}: headwise {times['headwise']:.1f} ms, stock {times['stock']:.1f} ms, "
            f"{ratio(timings['stock'], timings['headwise'])}"
        )
    sizes = []
    for index in range(1, 101):
        ours.generate(ids[:1], max_new_tokens=16, min_new_tokens=16, do_sample=False)
        sizes += [resident()] if index in (3, 100) else []
    print(
        f"resident after 3 and 100 generations: {sizes[0] / 2**20:.0f}, {sizes[1] / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()

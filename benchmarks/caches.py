"""SmolLM2-135M on each cache: bytes a token, perplexity, and the time of one token.

    python benchmarks/caches.py --text FILE [--context 8000] [--rounds 9] [--dtype float32]

Perplexity is of the first 8,192 tokens of FILE in rows of 2,048, read through the cache in chunks
of 256: what a cache rounds is what the tokens attend to. The times are of one token behind 128 and
behind `--context` cached ones, every cache in turn in one process. Transformers' own quantised
cache (4 bits) is measured beside them where optimum-quanto is installed; it keeps up to 128 tokens,
and those of the chunk that is read, as they are.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import torch
import transformers.cache_utils as stock
from report import environment
from transformers.utils import is_optimum_quanto_available

import headwise
from headwise.caches import CacheChoice
from headwise.hf import cache_nbytes, use_own_layers
from headwise.loading.load import load
from headwise.loading.source import demo_model
from headwise.measure import interleaved, ratio

ROW, ROWS, CHUNK, SHORT = 2048, 4, 256, 128
OURS = ("contiguous", "paged", "paged:16", "int8", "int4")
STOCK = "Transformers, quanto 4 bits"


def new_cache(name: str, config: Any) -> Any:
    if name == STOCK:
        return stock.QuantizedCache("quanto", config, nbits=4)
    return use_own_layers(stock.DynamicCache(config=config), CacheChoice.parse(name))


def perplexity(model: Any, rows: torch.Tensor, name: str) -> float:
    total = 0.0
    for row in rows.split(1):
        cache = new_cache(name, model.config)
        logits = [model(chunk, cache=cache).logits[0].float() for chunk in row.split(CHUNK, dim=1)]
        scores = torch.cat(logits)[:-1]
        total += torch.nn.functional.cross_entropy(scores, row[0, 1:], reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    model, tokenizer = load(demo_model(), dtype=options.dtype)
    headwise.attach(model)
    ids = tokenizer(options.text.read_text("utf-8")[:200_000], return_tensors="pt").input_ids[0]
    needed = max(ROW * ROWS, options.context + 1)
    if len(ids) < needed:
        parser.error(f"{options.text} has {len(ids)} tokens, expected at least {needed}")
    names = [*OURS, *([STOCK] if is_optimum_quanto_available() else [])]
    print(environment())
    if STOCK not in names:
        print("optimum-quanto is not installed: Transformers' quantised cache is left out")
    with torch.no_grad():
        filled = new_cache("contiguous", model.config)
        for chunk in ids[None, : options.context].split(512, dim=1):
            model(chunk, cache=filled, logits_to_keep=1)
        token = ids[None, options.context : options.context + 1]
        runs, sizes = {}, {}
        for name in names:
            for length in (SHORT, options.context):
                cache = new_cache(name, model.config)
                for index, layer in enumerate(filled.layers):
                    cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
                runs[name, length] = functools.partial(step, model, token, cache, name)
            sizes[name] = "" if name == STOCK else f"{cache_nbytes(cache) / options.context:,.0f}"
        timings = interleaved(runs, rounds=options.rounds, warmup=2)
        rows = ids[: ROW * ROWS].view(ROWS, ROW)
        print(f"\nSmolLM2-135M, {options.dtype}; perplexity of {ROW * ROWS:,} tokens\n")
        print(
            f"| cache | bytes a token | perplexity | ms a token at {SHORT:,} | at "
            f"{options.context:,} | against contiguous |\n|---|---|---|---|---|---|"
        )
        plain = None
        for name in names:
            found = perplexity(model, rows, name)
            plain = found if plain is None else plain
            short, long = timings[name, SHORT], timings[name, options.context]
            print(
                f"| {name} | {sizes[name]} | {found:.3f} ({found / plain - 1:+.2%}) | "
                f"{short.median * 1e3:.1f} | {long.median * 1e3:.1f} | "
                f"{ratio(long, timings['contiguous', options.context])} |",
                flush=True,
            )


def step(model: Any, token: torch.Tensor, cache: Any, name: str) -> object:
    out = model(token, cache=cache)
    if name != STOCK:  # which cannot be cropped
        cache.crop(-1)
    return out


if __name__ == "__main__":
    main()

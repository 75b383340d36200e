"""What the rounding of rows before packed weights costs: perplexity, and a median logit's error.

    python benchmarks/packed_quality.py MODEL.gguf TEXT [--formats file,Q4_0,...] [--tokens 20000]

"file" is the file's own blocks. For another format every product and embedding whose rows are whole
blocks is rounded to it (simply: K formats without the search of llama.cpp). Each time the packed
model is compared with one that has the numbers of the same blocks in float32, so that what is
measured is the rounding of rows to 8 bits, not that of weights.
"""

import argparse
import copy
from pathlib import Path

import gguf
import numpy as np
import torch
from report import environment
from torch import Tensor
from transformers import AutoTokenizer

import headwise
from headwise.hf.packed import PackedEmbedding, PackedLinear, holders, put_packed
from headwise.ops import BLOCK_FORMATS, pack, unpack

WINDOW = 1000


def to_blocks(weight: Tensor, name: str) -> Tensor:
    """Rows [F, blocks, bytes] of a format, of a weight [F,E]."""
    numbers, known = weight.float().numpy(), BLOCK_FORMATS[name]
    if not name.endswith("_K"):
        blocks = gguf.quantize(numbers, gguf.GGMLQuantizationType[name])
        return torch.from_numpy(blocks).view(len(numbers), -1, known.bytes)
    groups = numbers.reshape(len(numbers), -1, 256)
    return torch.from_numpy((six if name == "Q6_K" else four_or_five)(groups, name == "Q5_K"))


def half(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float16).view(np.uint8)


def four_or_five(groups: np.ndarray, five: bool) -> np.ndarray:
    parts = groups.reshape(*groups.shape[:2], 8, 32)
    low = np.minimum(parts.min(-1), 0)
    scale = (parts.max(-1) - low) / (31 if five else 15)
    step = np.maximum(scale.max(-1, keepdims=True) / 63, 1e-8).astype(np.float16)
    low_step = np.maximum(-low.min(-1, keepdims=True) / 63, 1e-8).astype(np.float16)
    s = np.rint(scale / step).clip(0, 63).astype(np.uint8)
    m = np.rint(-low / low_step).clip(0, 63).astype(np.uint8)
    unit = (s * step.astype(np.float32))[..., None]
    shift = (m * low_step.astype(np.float32))[..., None]
    levels = np.rint((parts + shift) / np.where(unit > 0, unit, 1)).clip(0, 31 if five else 15)
    q = levels.astype(np.uint8)
    first, second = s[..., :4], m[..., :4]
    packed = [
        first | (s[..., 4:] >> 4) << 6,
        second | (m[..., 4:] >> 4) << 6,
        (s[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
    ]
    nibbles = q & 15
    low_bits = (nibbles[:, :, ::2] | nibbles[:, :, 1::2] << 4).reshape(*q.shape[:2], 128)
    bits = (q >> 4) << np.arange(8, dtype=np.uint8)[:, None]
    fifth = [np.bitwise_or.reduce(bits, axis=2)] if five else []
    return np.concatenate([half(step), half(low_step), *packed, *fifth, low_bits], axis=-1)


def six(groups: np.ndarray, _: bool) -> np.ndarray:
    parts = groups.reshape(*groups.shape[:2], 16, 16)
    scale = np.abs(parts).max(-1) / 31
    step = np.maximum(scale.max(-1, keepdims=True) / 127, 1e-8).astype(np.float16)
    s = np.rint(scale / step).clip(1, 127).astype(np.int8)
    unit = (s * step.astype(np.float32))[..., None]
    levels = (np.rint(parts / unit).clip(-32, 31) + 32).astype(np.uint8)
    q = levels.reshape(*groups.shape[:2], 2, 4, 32)
    low, high = q & 15, q >> 4
    nibbles = [low[..., k, :] | low[..., k + 2, :] << 4 for k in range(2)]
    low_bits = np.stack(nibbles, axis=-2).reshape(*groups.shape[:2], 128)
    turns = 2 * np.arange(4, dtype=np.uint8)[:, None]
    high_bits = np.bitwise_or.reduce(high << turns, axis=-2).reshape(*groups.shape[:2], 64)
    return np.concatenate([low_bits, high_bits, s.view(np.uint8), half(step)], axis=-1)


def rounded_to(name: str, floats: torch.nn.Module) -> torch.nn.Module:
    """A model with packed weights in a format; `floats` gets the numbers of its blocks."""
    columns, packed = BLOCK_FORMATS[name].columns, {}
    for module in holders(floats).values():
        if module.weight.shape[1] % columns == 0 and id(module.weight) not in packed:
            packed[id(module.weight)] = pack(to_blocks(module.weight.detach(), name))
    by_name = {
        key: packed[id(module.weight)]
        for key, module in holders(floats).items()
        if id(module.weight) in packed
    }
    share = {id(tensor): tensor for tensor in (*floats.parameters(), *floats.buffers())}
    model = copy.deepcopy(floats, share)
    put_packed(model, by_name, torch.float32)
    with torch.no_grad():
        for key, matrix in by_name.items():
            floats.get_parameter(key).copy_(unpack(matrix, torch.float32))
    return model


@torch.no_grad()
def compare(packed: torch.nn.Module, floats: torch.nn.Module, ids: Tensor) -> dict[str, float]:
    """Perplexities of both, and how far logits are apart."""
    nats, errors = {"packed": 0.0, "floats": 0.0}, []
    for window in ids.split(WINDOW):
        logits = {
            name: model(window[None]).logits[0].float()
            for name, model in (("packed", packed), ("floats", floats))
        }
        for name, rows in logits.items():
            loss = torch.nn.functional.cross_entropy(rows[:-1], window[1:], reduction="sum")
            nats[name] += float(loss)
        rows = logits["floats"]
        error = (logits["packed"] - rows).abs().median(-1).values
        errors.append((error / rows.std(-1)).median())
    count = len(ids) - len(ids.split(WINDOW))
    return {name: float(np.exp(total / count)) for name, total in nats.items()} | {
        "median logit error": float(torch.stack(errors).median())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model"), parser.add_argument("text", type=Path)
    parser.add_argument("--formats", default="file,Q4_0,Q4_1,Q5_0,Q5_1,Q8_0")
    parser.add_argument("--tokens", type=int, default=20000)
    arguments = parser.parse_args()
    print(environment())
    for name in arguments.formats.split(","):
        floats, tokenizer = headwise.load(arguments.model, dtype="float32")
        tokenizer: AutoTokenizer
        text = arguments.text.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text).input_ids[: arguments.tokens])
        if name == "file":
            packed, _ = headwise.load(arguments.model, weights="packed", dtype="float32")
        else:
            packed = rounded_to(name, floats)
        modules = [m for m in packed.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
        headwise.attach(packed), headwise.attach(floats)
        found = compare(packed, floats, ids)
        ratio = found["packed"] / found["floats"] - 1
        print(
            f"{name:5} {len(modules)} packed modules, {len(ids):,} tokens of "
            f"{arguments.text.name}: perplexity {found['packed']:.4f} against "
            f"{found['floats']:.4f} ({ratio:+.3%}); median logit error "
            f"{found['median logit error']:.2%} of the logits' deviation",
            flush=True,
        )


if __name__ == "__main__":
    main()

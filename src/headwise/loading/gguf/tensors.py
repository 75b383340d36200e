"""Is every tensor of a GGUF file used, and every weight of its model filled? Asked before reading.

Transformers' reader passes over a tensor that it has no place for, and fills a weight that the
file does not hold with random numbers; neither may pass in silence.
"""

import math
import re
from collections import defaultdict
from typing import Any

import torch

from headwise.errors import LoadError
from headwise.loading.gguf.file import BESIDE_TENSORS, GgufFile
from headwise.loading.gguf.rotation import ROPE_TENSORS
from headwise.loading.gguf.stock_reader import stock_reader


def check_tensors(gguf: GgufFile, config: Any) -> None:
    """Compare the file's tensors with the weights of the model that its header describes.

    Raises:
        LoadError: names a tensor that is missing, left over or of another size.
    """
    from transformers import AutoModelForCausalLM

    file = gguf.path
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    reader = stock_reader(gguf, model)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    filled: dict[str, list[str]] = defaultdict(list)
    left = []
    for name in gguf.tensors:
        place = reader.place(name)
        if place in wanted:
            filled[place].append(name)
        elif not (
            name in ROPE_TENSORS
            or name.startswith(BESIDE_TENSORS)
            or _matches(place, model._keys_to_ignore_on_load_unexpected)
        ):
            left.append(name)
    if left:
        kind = type(model).__name__
        gguf.refuse(f"holds {_first(left)}, which Transformers' {kind} does not use")
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    names = {place: name for name, place in reader.places.items()}
    missing = [
        names.get(place, place)
        for place in wanted
        if place not in filled
        and place not in tied
        and not _matches(place, model._keys_to_ignore_on_load_missing)
    ]
    if missing:
        raise LoadError(
            f"{file} lacks {_first(missing)}, which its header asks for: a part of a model, or a "
            "damaged file; give the whole file"
        )
    for place, sources in filled.items():
        elements = sum(math.prod(gguf.tensors[name].shape) for name in sources)
        if elements != math.prod(wanted[place]):
            shapes = ", ".join(f"{name} {list(gguf.tensors[name].shape)}" for name in sources)
            raise LoadError(
                f"{file} holds {shapes} where its header asks for {list(wanted[place])} "
                f"({place}): header and tensors are not of one model"
            )


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, first {names[0]}"

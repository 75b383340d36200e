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


def check_tensors(gguf: GgufFile, config: Any) -> None:
    """Compare the file's tensors with the weights of the model that its header describes.

    Raises:
        LoadError: names a tensor that is missing, left over or of another size.
    """
    from transformers import AutoModelForCausalLM

    file = gguf.path
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    places = _places(gguf, model, config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    filled: dict[str, list[str]] = defaultdict(list)
    left = []
    for name in gguf.tensors:
        place = places.get(name) or places.get(name.removesuffix(".weight"), name)
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
    names = {place: name for name, place in places.items()}
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


def _places(gguf: GgufFile, model: Any, config: Any) -> dict[str, str]:
    """Which weight of the model each tensor name fills; Transformers has two readers for this."""
    from headwise.hf.stock_names import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        WeightConverter,
        WeightRenaming,
        get_gguf_conversion_mapping,
        get_gguf_hf_weights_map,
        is_gguf_arch_supported,
        rename_source_key,
    )

    architecture = gguf.architecture.name
    if is_gguf_arch_supported(architecture):
        mapping = get_gguf_conversion_mapping(architecture, config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        return {name: rename_source_key(name, renamings, converters)[0] for name in gguf.tensors}
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    places: dict[str, str] = get_gguf_hf_weights_map(_Shallow(model, depth=1), processor)
    return places


class _Shallow:
    """A model with its children down to one depth, for the name map alone.

    Transformers makes that map again for every module of the tree (29 s for a 135M model); only the
    model and the base model in it (Bloom's names) ever add a name.
    """

    def __init__(self, module: torch.nn.Module, depth: int) -> None:
        self.module, self.depth = module, depth
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Shallow"]]:
        if not self.depth:
            return []
        return [
            (name, _Shallow(child, self.depth - 1)) for name, child in self.module.named_children()
        ]


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, first {names[0]}"

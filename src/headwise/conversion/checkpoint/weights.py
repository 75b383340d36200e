"""Weights of a checkpoint, one tensor at a time: read from safetensors and written to them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headwise.base.tensor_files import open_weights
from headwise.errors import LoadError
from headwise.loading.weight_files import INDEX, WHOLE, weight_files

_SHARD_BYTES = 512 * 2**20
_LAYERS = "model.layers."


def layer_prefix(index: int) -> str:
    """What the names of a decoder layer's tensors begin with.

    >>> layer_prefix(3)
    'model.layers.3.'
    """
    return f"{_LAYERS}{index}."


def in_attention(name: str) -> bool:
    """Whether a parameter is the attention's, by its name: what a conversion touches."""
    return ".self_attn." in name


class StoredWeights:
    """The tensors of a model folder, by name; each is read when it is asked for.

    Raises:
        LoadError: a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        # other files beside these are not the model's
        paths = weight_files(folder)
        if not paths:
            raise LoadError(f"{folder} has neither {WHOLE} nor {INDEX}")
        for path in paths:
            file = open_weights(path)
            self._files |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files:
            raise LoadError(f"{self.folder} has no weight {name}, which its config.json asks for")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a decoder layer by their names within it, in float32."""
        prefix = layer_prefix(index)
        return {
            name.removeprefix(prefix): self[name].to(torch.float32)
            for name in self
            if name.startswith(prefix)
        }

    def outside_layers(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the tensor of every weight that belongs to no decoder layer."""
        return ((name, self[name]) for name in self if not name.startswith(_LAYERS))

    def attention_dtype(self, index: int) -> torch.dtype:
        """The dtype that the attention of a decoder layer is stored in."""
        return self[f"{layer_prefix(index)}self_attn.q_proj.weight"].dtype


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = _SHARD_BYTES
) -> None:
    """Write tensors into safetensors files of at most `shard_bytes`, named as Transformers does.

    They are taken one by one, and no more than one file's are in memory.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_weights(folder, [("weight", torch.ones(2))])
        >>> StoredWeights(folder)["weight"]
        tensor([1., 1.])
    """
    parts: dict[Path, list[str]] = {}
    total_bytes = 0
    for shard in _shards(tensors, shard_bytes):
        part = folder / f"part-{len(parts)}.safetensors"
        save_file(shard, part, metadata={"format": "pt"})
        parts[part] = list(shard)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        del shard  # before the next one is made
    if len(parts) == 1:
        part.rename(folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, (part, names) in enumerate(parts.items(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file in turn; one without any where there are none at all."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().contiguous()
        size += tensor.nbytes
    yield shard

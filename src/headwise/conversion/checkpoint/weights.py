"""Weights of a checkpoint, one tensor at a time: read from safetensors and written to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headwise.errors import LoadError
from headwise.loading.weight_files import INDEX, WHOLE, open_weights, weight_files

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


class ShardWriter:
    """Writes tensors into safetensors files of at most `shard_bytes`, named as Transformers does.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> writer = ShardWriter(folder)
        >>> writer.add("weight", torch.ones(2))
        >>> writer.close()
        >>> StoredWeights(folder)["weight"]
        tensor([1., 1.])
    """

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_bytes = self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written once enough of them have come together."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the files their names and list them in an index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / WHOLE)
            return
        places: dict[str, str] = {}
        for number, shard in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            places |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

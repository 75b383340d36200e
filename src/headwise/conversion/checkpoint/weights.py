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


def in_attention(name: str) -> bool:
    """Whether a parameter is the attention's, by its name: what a conversion touches."""
    return ".self_attn." in name


class Weights:
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

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it, in float32."""
        return {
            name.removeprefix(prefix): self[name].to(torch.float32)
            for name in self._files
            if name.startswith(prefix)
        }


class ShardWriter:
    """Writes tensors into safetensors files of at most `shard_bytes`, named as Transformers does.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> writer = ShardWriter(folder)
        >>> writer.add("weight", torch.ones(2))
        >>> writer.close()
        >>> Weights(folder)["weight"]
        tensor([1., 1.])
    """

    def __init__(self, folder: Path, shard_bytes: int = _SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; it is written when enough of them have come together."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes() + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self._total += size

    def close(self) -> None:
        """Write what is left, give the files their names and list them in an index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / WHOLE)
            return
        names = [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
        for at, name in enumerate(names):
            self._part(at).rename(self.folder / name)
        held = {tensor: names[at] for at, shard in enumerate(self._shards) for tensor in shard}
        index = {"metadata": {"total_size": self._total}, "weight_map": held}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _pending_bytes(self) -> int:
        return sum(at.numel() * at.element_size() for at in self._pending.values())

    def _part(self, at: int) -> Path:
        return self.folder / f"part-{at}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending = {}

"""The states of a tuning on the disk, each written atomically, so that it can resume."""

import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headwise.base.files import one_line
from headwise.base.tensor_files import open_weights
from headwise.base.written import written_whole
from headwise.conversion.checkpoint.workspace import resumed, write_record

_STEP = re.compile(r"step-(\d+)")
_TENSORS = "state.safetensors"


Losses = tuple[float, float]
"""Of a step: its divergence in nats per token, and the relative squared error of the attention."""


class TuningFolder:
    """The states of one tuning: folders step-N, of which the newest counts.

    Args:
        folder: it is made where there is none.
        identity: everything that the result follows from, as values that JSON keeps.

    Raises, in each method:
        LoadError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self._failed = f"cannot keep the tuning in {folder}"
        with one_line(self._failed):
            folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> tuple[list[Losses], dict[str, Tensor]] | None:
        """Read the state that was written last; None where there is none.

        Returns:
            the losses of each step that was made, and what the next step needs, by name.

        Raises:
            OptionError: it is another tuning's.
        """
        states = self._states()
        if not states:
            return None
        newest = states[max(states)]
        with resumed(newest, self.identity, self.folder, "tuning") as record:
            losses = [(float(left), float(right)) for left, right in record["losses"]]
            with open_weights(newest / _TENSORS) as file:
                names = list(file.keys())
                return losses, {name: file.get_tensor(name) for name in names}

    def write(self, losses: list[Losses], tensors: dict[str, Tensor]) -> None:
        """Write a state, as `newest` gives it, and then remove the older ones."""
        older = self._states().values()
        with one_line(self._failed), written_whole(self.folder / f"step-{len(losses)}") as part:
            save_file(tensors, part / _TENSORS)
            write_record(part, self.identity, losses=losses)
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _states(self) -> dict[int, Path]:
        matches = {path: _STEP.fullmatch(path.name) for path in self.folder.iterdir()}
        return {int(match[1]): path for path, match in matches.items() if match}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the sha256 of named tensors: names, dtypes, shapes and bytes.

    >>> digest({"weight": torch.zeros(2)}) == digest({"weight": torch.zeros(2, 1)})
    False
    """
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]

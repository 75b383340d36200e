"""A GGUF file's header: what it says of the model, and which tensors it holds."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from headwise.base.files import ANYTHING, one_line
from headwise.errors import LoadError
from headwise.loading.gguf.architectures import Architecture, architecture_of
from headwise.loading.gguf.q5 import teach_q5

# Parts that see or hear, in one file with the model that they feed: by tensor, and by field.
BESIDE_TENSORS = ("v.", "mm.", "a.")
BESIDE_FIELDS = ("vision.", "mm.", "audio.")
# Keys of files that are something else than a language model.
_FOREIGN = ("adapter.", "clip.", "diffusion.", "xielu.")


@dataclass(frozen=True)
class GgufFile:
    """A header that was read: `fields` by key, `tensors` by name.

    An array of strings is its length. A tensor is Transformers' TensorInfo: its shape in PyTorch's
    order, its type, where it lies. `header` is Transformers' own.
    """

    path: Path
    architecture: Architecture
    fields: dict[str, Any]
    tensors: dict[str, Any]
    header: Any

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the architecture's field `name`."""
        return self.fields.get(f"{self.architecture.name}.{name}", default)

    def refuse(self, what: str) -> NoReturn:
        """Say what of the file Transformers' model would do otherwise.

        Raises:
            LoadError: always.
        """
        raise LoadError(
            f"{self.path} {what}: the model would compute something else; give the original "
            "model's folder"
        )

    @property
    def float32_bytes(self) -> int:
        """Bytes of the weights once dequantised."""
        elements = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        return elements * torch.float32.itemsize


def read_header(file: Path) -> GgufFile:
    """Read a header; the file may be the first of a split model, its weights are not looked at.

    Raises:
        LoadError: a damaged file, one that is no language model, or a later file of a split one.
    """
    from headwise.hf.stock_names import GgufHeader, read_gguf_metadata

    teach_q5()
    with one_line(f"{file} is not a GGUF file that can be read", faults=ANYTHING):
        try:
            fields, _ = read_gguf_metadata(str(file))
        except ValueError as error:
            if "general.architecture" in str(error):
                _refuse_later_part(file)
            raise
        header = GgufHeader.from_file(str(file))
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if len(tensors) < len(header.tensors):
        names = [tensor.name for tensor in header.tensors]
        twice = next(name for name in names if names.count(name) > 1)
        raise LoadError(f"{file} is not a GGUF file that can be read: it holds {twice} twice")
    kind = fields.get("general.type", "model")
    foreign = sorted(key for key in fields if key.startswith(_FOREIGN))
    if kind != "model" or foreign:
        what = f"general.type {kind!r}" if kind != "model" else foreign[0]
        raise LoadError(f"{file} is not a language model ({what}); give the model's own file")
    with one_line(f"{file} is not a GGUF file that can be read", faults=ANYTHING):
        ends = [header.data_start + tensor.offset + tensor.nbytes for tensor in header.tensors]
        size, end = file.stat().st_size, max(ends, default=0)
    if end > size:
        raise LoadError(f"{file} is cut short: {size} bytes of {end}; download it again")
    return GgufFile(file, architecture_of(header.architecture), fields, tensors, header)


def check_one_file(gguf: GgufFile) -> None:
    """Refuse one of several files that a model was split into, and a file without weights.

    Raises:
        LoadError: says which file it is, and what to do.
    """
    file = gguf.path
    count = gguf.fields.get("split.count", 1)
    if not isinstance(count, int) or count > 1:
        _refuse_part(file, gguf.fields.get("split.no", 0), count)
    if not gguf.tensors:
        raise LoadError(f"{file} holds no weights (a vocabulary alone?); give a model's file")


def check_blocks(gguf: GgufFile) -> None:
    """Refuse a file that holds more or fewer blocks than its header says.

    Raises:
        LoadError: names the first tensor or block.
    """
    file = gguf.path
    blocks = gguf.get("block_count")
    if type(blocks) is not int:
        raise LoadError(
            f"{file} does not say {gguf.architecture.name}.block_count; download it again"
        )
    # Before a model is made of it: a damaged count could ask for billions of layers.
    present = {
        int(match[1]): name for name in gguf.tensors if (match := re.match(r"blk\.(\d+)\.", name))
    }
    if extra := sorted(number for number in present if number >= blocks):
        raise LoadError(
            f"{file} holds {present[extra[0]]}, but its header says {blocks} blocks "
            f"(blk.0 to blk.{blocks - 1}): header and tensors are not of one model"
        )
    if len(present) < blocks:
        missing = next(number for number in range(blocks) if number not in present)
        raise LoadError(
            f"{file} lacks {blocks - len(present)} of its {blocks} blocks, first blk.{missing}: a "
            "part of a model, or a conversion that was cut off; give the whole file"
        )


def _refuse_later_part(file: Path) -> None:
    """A later file of a split model says nothing but its number."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    if "split.count" in fields:
        number = fields["split.no"].contents() if "split.no" in fields else 0
        _refuse_part(file, number, fields["split.count"].contents())


def _refuse_part(file: Path, number: Any, count: Any) -> None:
    part = f"{number + 1} of {count}" if isinstance(number, int) else f"one of {count}"
    raise LoadError(
        f"{file} is file {part} of a split model; join them with "
        "`llama-gguf-split --merge FIRST OUT` and give the joined file"
    )

"""One GGUF file into one model folder, through Transformers' own reader and dequantiser."""

import math
import struct
from pathlib import Path
from typing import Any

import torch

from headwise.errors import LoadError
from headwise.loading.memory import check_memory
from headwise.loading.progress import Progress, tqdm_lines, transformers_progress

# What a damaged or foreign file makes the readers raise, beside our own errors.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, NotImplementedError, struct.error)


def float32_bytes(file: Path) -> int:
    """Bytes of a GGUF file's weights once dequantised; also checks that none is cut off.

    Raises:
        LoadError: a damaged file, or a tensor type that Transformers cannot read.
    """
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        header = GgufHeader.from_file(str(file))
        ends = [header.data_start + info.offset + info.nbytes for info in header.tensors]
        elements = sum(math.prod(info.shape) for info in header.tensors)
    except (*_BROKEN, OverflowError, MemoryError) as error:
        raise LoadError(f"{file} is not a GGUF file that can be read: {_line(error)}") from error
    if not ends:
        raise LoadError(f"{file} holds no weights (a vocabulary alone?); give a model's file")
    size = file.stat().st_size
    if max(ends) > size:
        raise LoadError(f"{file} is cut short: {size} bytes of {max(ends)}; download it again")
    return elements * torch.float32.itemsize


def read_config(file: Path) -> dict[str, Any]:
    """The config that a GGUF file's header amounts to; no weights are read.

    Raises:
        LoadError: a damaged file, or an architecture that Transformers cannot read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (*_BROKEN, OSError, ImportError) as error:
        raise LoadError(f"{file} cannot be read by Transformers: {_line(error)}") from error
    fields: dict[str, Any] = config.to_dict()
    return fields


def write_folder(file: Path, folder: Path, progress: Progress) -> None:
    """Write a GGUF's weights (float32, as Transformers dequantises them), config and tokenizer.

    Raises:
        LoadError: an architecture or tokenizer that Transformers cannot read.
        CapacityError: the dequantised weights would not fit in memory.
    """
    # The reader holds the dequantised tensors and the model made of them at the same time.
    check_memory(2 * float32_bytes(file), torch.device("cpu"), f"converting {file.name}")
    stage = f"converting {file.name}, once: "
    try:
        tokenizer, model = _read(file, progress, stage)
    except (*_BROKEN, OSError, ImportError) as error:
        raise LoadError(f"{file} cannot be read by Transformers: {_line(error)}") from error
    progress(stage + "writing", 0, 0)
    with transformers_progress(progress, stage + "writing"):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(file: Path, progress: Progress, stage: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    progress(stage + "vocabulary", 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    progress(stage + "config", 0, 0)
    config = AutoConfig.from_pretrained(file.parent, **where)
    progress(stage + "weights", 0, 0)
    with (
        tqdm_lines(progress, stage + "weights"),
        transformers_progress(progress, stage + "weights"),
    ):
        read = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **where,
        )
    # A model read from GGUF counts as quantised and refuses to be saved, so its tensors move to one
    # that does not; on the meta device, where making it costs nothing.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return tokenizer, model


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

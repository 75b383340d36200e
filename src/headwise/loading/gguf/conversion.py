"""One GGUF file into one model folder, through Transformers' own reader and dequantiser."""

from pathlib import Path
from typing import Any

import torch

from headwise.base.files import ANYTHING, one_line
from headwise.base.memory import check_memory
from headwise.base.progress import Progress
from headwise.loading.gguf.config import gguf_config
from headwise.loading.gguf.file import GgufFile, check_blocks, check_one_file, read_header
from headwise.loading.gguf.rotation import check_rope
from headwise.loading.gguf.tensors import check_tensors
from headwise.loading.loaded import check_loading
from headwise.loading.progress import gguf_progress, quiet_transformers, transformers_progress

UNREADABLE = "cannot be read by Transformers"


def float32_bytes(file: Path) -> int:
    """Bytes of a GGUF file's weights once dequantised; also checks that none is cut off.

    Raises:
        LoadError: a damaged file, a part of a model, or a tensor type that Transformers lacks.
    """
    gguf = read_header(file)
    check_one_file(gguf)
    return gguf.float32_bytes


def read_config(file: Path) -> dict[str, Any]:
    """The config that a GGUF file's header amounts to; no weights are read.

    Raises:
        LoadError: a damaged file, an architecture that Transformers cannot read, or a field that
            it would ignore.
    """
    gguf = read_header(file)
    with one_line(f"{file} {UNREADABLE}", faults=ANYTHING), quiet_transformers():
        fields: dict[str, Any] = gguf_config(gguf).to_dict()
    return fields


def write_folder(file: Path, folder: Path, progress: Progress) -> None:
    """Write a GGUF's weights (float32, as Transformers dequantises them), config and tokenizer.

    Raises:
        LoadError: an architecture or tokenizer that Transformers cannot read, or anything that
            the file says and the model made of it would not do.
        CapacityError: the dequantised weights would not fit in memory.
    """
    gguf = read_header(file)
    check_one_file(gguf)
    check_blocks(gguf)
    # The reader holds the dequantised tensors and the model made of them at the same time.
    check_memory(2 * gguf.float32_bytes, torch.device("cpu"), f"converting {file.name}")
    stage = f"converting {file.name}, once: "
    with one_line(f"{file} {UNREADABLE}", faults=ANYTHING), quiet_transformers():
        tokenizer, model = _read(gguf, progress, stage)
    progress(stage + "writing", 0, 0)
    with transformers_progress(progress, stage + "writing"):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(gguf: GgufFile, progress: Progress, stage: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf.path
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    progress(stage + "config", 0, 0)
    config = gguf_config(gguf)
    check_tensors(gguf, config)
    progress(stage + "vocabulary", 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    progress(stage + "weights", 0, 0)
    with (
        gguf_progress(progress, stage + "weights"),
        transformers_progress(progress, stage + "weights"),
    ):
        read, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **where,
        )
    # check_tensors went by names and numbers of elements; this is what was done in the end.
    check_loading(file, loading, read)
    check_rope(gguf, read)
    # A model read from GGUF counts as quantised and refuses to be saved, so its tensors move to one
    # that does not; on the meta device, where making it costs nothing.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return tokenizer, model

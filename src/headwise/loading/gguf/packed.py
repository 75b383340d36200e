"""One GGUF file into one folder whose weights stay in the file's blocks, and a model of that.

Weights that are one tensor of the file become packed matrices; the others are dequantised.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.base.files import ANYTHING, one_line
from headwise.base.progress import Progress
from headwise.base.tensor_files import Shaped, open_weights, write_weights
from headwise.errors import LoadError
from headwise.loading.gguf.config import gguf_config
from headwise.loading.gguf.conversion import UNREADABLE
from headwise.loading.gguf.file import GgufFile, check_blocks, check_one_file, read_header
from headwise.loading.gguf.rotation import check_rope
from headwise.loading.gguf.rows import StoredRows, stored_rows
from headwise.loading.gguf.stock_reader import float_weights, sources, stock_reader
from headwise.loading.gguf.tensors import check_tensors
from headwise.loading.options import LoadOptions
from headwise.loading.progress import quiet_transformers
from headwise.ops import BLOCK_FORMATS, is_packed, pack, packed_columns

# Not the name of a checkpoint's file: Transformers is not to take the blocks for weights.
PACKED = "packed.safetensors"


def write_packed_folder(file: Path, folder: Path, progress: Progress) -> None:
    """Write a GGUF's weights in its own blocks, and its config and tokenizer.

    Raises:
        LoadError: as `write_folder`.
    """
    from transformers import AutoTokenizer

    gguf = read_header(file)
    check_one_file(gguf)
    check_blocks(gguf)
    stage = f"converting {file.name}, once: weights"
    with one_line(f"{file} {UNREADABLE}", faults=ANYTHING), quiet_transformers():
        progress(f"converting {file.name}, once: config", 0, 0)
        config = gguf_config(gguf)
        check_tensors(gguf, config)
        model = empty_model(config, LoadOptions(attention="eager"))
        check_rope(gguf, model)
        progress(f"converting {file.name}, once: vocabulary", 0, 0)
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
        stored = packable(gguf, model)
        weights = model.state_dict()
        filled = sources(gguf, stock_reader(gguf, model), model)
        others = [name for name in weights if name in filled and name not in stored]
        shapes: dict[str, Shaped] = {
            name: ("U8", _blocks(gguf, rows.tensor)) for name, rows in stored.items()
        } | {name: ("F32", tuple(weights[name].shape)) for name in others}
        tensors = _tensors(gguf, model, stored, others, partial(progress, stage))
        write_weights(folder / PACKED, shapes, tensors)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def packable(gguf: GgufFile, model: Any) -> dict[str, StoredRows]:
    """The weights of products and embeddings that can stay in the blocks of the file."""
    from headwise.hf.packed import holders

    able = holders(model)
    return {
        name: rows
        for name, rows in stored_rows(gguf, model).items()
        if name in able and _kind(gguf, rows.tensor) in BLOCK_FORMATS
    }


def _kind(gguf: GgufFile, tensor: str) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(gguf.tensors[tensor].ggml_type).name


def _blocks(gguf: GgufFile, tensor: str) -> tuple[int, int, int]:
    """The shape of a tensor's rows of blocks."""
    rows, columns = gguf.tensors[tensor].shape
    known = BLOCK_FORMATS[_kind(gguf, tensor)]
    return rows, columns // known.columns, known.bytes


def _tensors(
    gguf: GgufFile,
    model: Any,
    stored: dict[str, StoredRows],
    others: list[str],
    tell: Callable[[int, int], None],
) -> Iterator[Tensor]:
    """The packed matrices, then the other weights, one at a time."""
    for done, rows in enumerate(stored.values()):
        tell(done, len(stored))
        at = gguf.header.data_start + gguf.tensors[rows.tensor].offset
        shape = _blocks(gguf, rows.tensor)
        blocks = np.fromfile(gguf.path, np.uint8, shape[0] * shape[1] * shape[2], offset=at)
        yield pack(torch.from_numpy(blocks).view(shape), rows.order)
    right = model.state_dict()
    for name, weight in float_weights(gguf, model, others):
        if weight.shape != right[name].shape:
            raise LoadError(
                f"{gguf.path} holds {name} of shape {list(weight.shape)} where its config asks for "
                f"{list(right[name].shape)}: config and weights are not of one model"
            )
        yield weight


def empty_model(config: Any, options: LoadOptions) -> Any:
    """A model of a config whose parameters have no memory, and whose buffers do."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=options.torch_dtype or torch.float32,
            attn_implementation=options.attention,
        )


def load_packed(folder: Path, config: Any, options: LoadOptions) -> Any:
    """The model of a folder that `write_packed_folder` wrote; its weights stay mapped.

    Raises:
        LoadError: weights that the model does not have, or that it needs and the folder lacks.
    """
    from transformers import GenerationConfig

    from headwise.hf.packed import put_packed

    dtype = options.torch_dtype or torch.float32
    model = empty_model(config, options)
    file = open_weights(folder / PACKED)
    read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    packed = {name: tensor for name, tensor in read.items() if is_packed(tensor)}
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    packed |= {name: packed[source] for name, source in tied.items() if source in packed}
    right = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, matrix in packed.items():
        shape = (matrix.shape[0], packed_columns(matrix))
        if right.get(name) != shape:
            raise LoadError(f"{folder} holds {name} of shape {shape}, expected {right.get(name)}")
    put_packed(model, packed, dtype)
    numbers = {name: tensor.to(dtype) for name, tensor in read.items() if name not in packed}
    missing, left = model.load_state_dict(numbers, strict=False, assign=True)
    parameters = dict(model.named_parameters())  # buffers that the file lacks are what they are
    absent = [name for name in missing if name in parameters and name not in tied]
    if left or absent:
        raise LoadError(f"{folder} and its config are not of one model: {(left + absent)[0]}")
    if not packed.keys() & tied.keys():
        model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model

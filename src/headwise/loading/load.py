"""A model and its tokenizer from a folder, a GGUF file or a hub id."""

from pathlib import Path
from typing import Any

from headwise.base.progress import Progress, silent
from headwise.loading.model_folder import ModelFolder
from headwise.loading.options import LoadOptions


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    weights: str = "float",
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model: (model, tokenizer), in evaluation mode.

    `model` is a folder, a .gguf file or a hub id. `dtype` "auto" keeps the checkpoint's own.
    `attention` is Transformers' name of an implementation; `headwise.attach` comes after loading.
    `weights` of a .gguf file are "float", dequantised, or "packed": they stay in the file's own
    blocks, of which the products are computed, and x is rounded to integers of 8 bits before.

        >>> import headwise
        >>> model, tokenizer = headwise.load("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> report = headwise.attach(model)  # doctest: +SKIP

    Raises:
        LoadError: no such model, not a model, not safe to read, or an option it cannot have.
        CapacityError: its weights would not fit in memory; says needed and available bytes.
    """
    options = LoadOptions(
        dtype=dtype,
        device=device,
        attention=attention,
        trust_remote_code=trust_remote_code,
        weights=weights,
        progress=progress or silent,
    )
    opened = ModelFolder.find(model, options)
    tokenizer = opened.tokenizer
    return opened.load(), tokenizer

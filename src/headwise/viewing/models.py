"""A model to look at: an encoder or a decoder, from a name, a folder, a GGUF file or the hub."""

from typing import Any

from headwise.base.progress import Progress, silent
from headwise.errors import LoadError, SpecError
from headwise.loading.model_folder import ModelFolder
from headwise.loading.options import LoadOptions
from headwise.loading.source import find_source
from headwise.spec import ModelSpec


def open_model(
    model: str | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[str, Any, Any]:
    """Load a model to look at: (its name, the model, the tokenizer), in evaluation mode.

    None or "minilm" is all-MiniLM-L6-v2, an encoder; "smollm2" SmolLM2-135M-Instruct, a decoder.

    Raises:
        LoadError: no such model, not one that is safe to read, or no encoder or decoder.
        CapacityError: its weights would not fit in memory.
    """
    options = LoadOptions(
        dtype=dtype,
        device=device,
        attention="eager",
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    place = "minilm" if model is None else model
    name, opened = find_source(place).name, ModelFolder.find(place, options)
    if opened.config.is_encoder_decoder:
        raise LoadError(
            f"{name} is an encoder-decoder ({opened.config.model_type}); a view is of an encoder "
            "or a decoder"
        )
    tokenizer = opened.tokenizer
    return name, opened.load(encoder=_is_encoder(opened.config)), tokenizer


def _is_encoder(config: Any) -> bool:
    try:
        return not ModelSpec.from_config(config).layers
    except SpecError:
        return False  # a family without a reader: taken for a decoder, which most are

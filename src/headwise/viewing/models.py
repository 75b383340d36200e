"""A model to look at: an encoder or a decoder, from a name, a folder, a GGUF file or the hub."""

from pathlib import Path
from typing import Any

from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.errors import LoadError, SpecError
from headwise.loading.load import (
    DTYPES,
    find_device,
    known_dtype,
    load,
    load_config,
    load_tokenizer,
    model_folder,
    transformers_errors,
)
from headwise.loading.loaded import check_encoder
from headwise.loading.memory import weight_bytes
from headwise.loading.progress import transformers_progress
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
    dtype = known_dtype(dtype)
    target = find_device(device)
    source = "minilm" if model is None else model
    name, folder = find_source(source).name, model_folder(source, progress=progress)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise LoadError(
            f"{name} is an encoder-decoder ({config.model_type}); a view is of an encoder or a "
            "decoder"
        )
    options: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if not _is_encoder(config):
        decoder = load(folder, device=device, attention="eager", progress=progress, **options)
        return name, *decoder
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    check_memory(weight_bytes(folder, DTYPES.get(dtype)), target, "loading the model")
    with transformers_progress(progress, "loading weights"):
        encoder = _encoder(folder, config, **options)
    return name, encoder.to(target).eval(), tokenizer


def _is_encoder(config: Any) -> bool:
    try:
        return not ModelSpec.from_config(config).layers
    except SpecError:
        return False  # a family without a reader: taken for a decoder, which most are


def _encoder(folder: Path, config: Any, dtype: str, trust_remote_code: bool) -> Any:
    """An encoder without a head, whose weights are checked to be all there."""
    from transformers import AutoModel

    with transformers_errors(folder, "model"):
        model, loading = AutoModel.from_pretrained(
            folder,
            output_loading_info=True,
            config=config,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused by name, as are missing and unexpected weights
        )
    check_encoder(folder, loading, model)
    return model

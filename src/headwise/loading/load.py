"""A model and its tokenizer from a folder, a GGUF file or a hub id.

Weights are read as safetensors or GGUF, never from a pickle; code that comes with a model runs only
when the caller says so; a local path needs no network; what would not fit is refused before it is
read. Each refusal is one line.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from headwise.base.files import reason
from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.errors import CapacityError, LoadError, SpecError
from headwise.loading.gguf_store import converted
from headwise.loading.hub import download
from headwise.loading.loaded import check_loading
from headwise.loading.memory import weight_bytes
from headwise.loading.progress import transformers_progress
from headwise.loading.source import check_folder, find_source
from headwise.spec.dtypes import dtype_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    model: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model: (model, tokenizer), in evaluation mode.

    `model` is a folder, a .gguf file or a hub id. `dtype` "auto" keeps the checkpoint's own.
    `attention` is Transformers' name of an implementation; `headwise.attach` comes after loading.

        >>> import headwise
        >>> model, tokenizer = headwise.load("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
        >>> report = headwise.attach(model)  # doctest: +SKIP

    Raises:
        LoadError: no such model, not a model, not safe to read, or an option it cannot have.
        CapacityError: its weights would not fit in memory; says needed and available bytes.
    """
    dtype = known_dtype(dtype)
    target = find_device(device)
    report = progress if progress is not None else silent
    folder = model_folder(model, progress=report)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    loaded = load_model(
        folder,
        config,
        dtype=dtype,
        device=target,
        attention=attention,
        trust_remote_code=trust_remote_code,
        progress=report,
    )
    return loaded, tokenizer


def model_folder(model: str | Path, *, progress: Progress = silent) -> Path:
    """The local folder with a model's files: itself, converted from GGUF, or downloaded.

    Raises:
        LoadError: no such model, not a model, or not safe to read.
    """
    source = find_source(model)
    if source.kind == "gguf":
        return converted(Path(source.place).absolute(), progress=progress)
    if source.kind == "hub":
        folder = download(source.place, progress)
        check_folder(folder)
        return folder
    return Path(source.place)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A folder's Transformers config."""
    from transformers import AutoConfig

    from headwise.hf import HeadwiseMlaConfig  # noqa: F401  (importing it makes the type known)

    with transformers_errors(folder, "config"):
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A folder's tokenizer."""
    from transformers import AutoTokenizer

    with transformers_errors(folder, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )


def load_model(
    folder: Path,
    config: Any,
    *,
    dtype: str = "auto",
    device: torch.device | None = None,
    attention: str = "sdpa",
    context: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Any:
    """A folder's model, after checking that its weights and a cache of `context` tokens fit.

    Raises:
        LoadError: damaged weights, or not a causal language model.
        CapacityError: weights and cache would not fit; says needed and available bytes.
    """
    from transformers import AutoModelForCausalLM

    dtype = known_dtype(dtype)
    target = device if device is not None else torch.device("cpu")
    chosen = DTYPES.get(dtype)
    weights = weight_bytes(folder, chosen)
    cache = cache_bytes(config, context, chosen or _config_dtype(config))
    what = "loading the model" + (f" with a cache of {context} tokens" if context else "")
    check_memory(weights + cache, target, what)
    stage = "loading weights"
    progress(stage, 0, 0)
    with transformers_errors(folder, "model"), transformers_progress(progress, stage):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            config=config,
            dtype=chosen or "auto",
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused by name, as are missing and unexpected weights
        )
        check_loading(folder, found, model)
        return model.to(target).eval()


def cache_bytes(config: Any, context: int, dtype: torch.dtype) -> int:
    """Bytes of a cache of `context` tokens; 0 for a family that has no spec yet."""
    from headwise.spec import ModelSpec

    if not context:
        return 0
    try:
        return int(ModelSpec.from_config(config).cache_bytes(context, 1, dtype))
    except SpecError:
        return 0  # stock attention runs such a model too, so this is no reason to refuse it


def known_dtype(dtype: str) -> str:
    """PyTorch's name of one of the three dtypes, or "auto".

    >>> known_dtype("bf16"), known_dtype("auto")
    ('bfloat16', 'auto')

    Raises:
        LoadError: another one.
    """
    name = dtype
    if dtype != "auto":
        with suppress(SpecError):
            name = dtype_name(dtype)
    if name not in ("auto", *DTYPES):
        raise LoadError(f"dtype {dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
    return name


def find_device(device: str) -> torch.device:
    """The device of a name; "auto" is the first CUDA device where there is one, else the CPU.

    Raises:
        LoadError: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    expected = "expected auto, cpu, cuda or cuda:1"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f"device {device!r} is unknown: {expected}") from error
    try:
        torch.empty(0, device=found)
    except NotImplementedError as error:
        raise LoadError(f"device {device!r} is not in this build of PyTorch: {expected}") from error
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise LoadError(f"device {device!r} cannot be used: {first[:150]}; {expected}") from error
    return found


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextmanager
def transformers_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn what Transformers raises for a bad folder into one line.

    Raises:
        LoadError: says that `what`, the folder's config, tokenizer or model, cannot be loaded.
    """
    try:
        yield
    except (LoadError, CapacityError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Nothing narrower is right: for a bad file Transformers, tokenizers, safetensors,
        # sentencepiece and protobuf raise whatever their code stumbles over, plain Exceptions and
        # types of their own among it.
        text = reason(error)
        if "trust_remote_code" in str(error):
            raise LoadError(
                f"{folder} needs code that comes with it; read that code, and if you trust it "
                "pass --trust-remote-code (trust_remote_code=True)"
            ) from error
        if "Unrecognized configuration class" in text:
            raise LoadError(
                f"{folder} is not a causal language model (decoder) that Transformers knows"
            ) from error
        raise LoadError(f"{folder}: its {what} cannot be loaded: {text}") from error

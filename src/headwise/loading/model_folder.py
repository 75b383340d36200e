"""A model's folder, opened once: its config, its tokenizer and its weights.

Weights are read as safetensors, never from a pickle; code that comes with a model runs only when
the caller says so; nothing needs a network; what would not fit is refused before it is read. Each
refusal is one line.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from headwise.base.files import ANYTHING, one_line, reason
from headwise.base.memory import check_memory
from headwise.base.progress import Progress, silent
from headwise.errors import CapacityError, LoadError, SpecError
from headwise.loading.gguf.packed import load_packed
from headwise.loading.gguf.store import converted
from headwise.loading.hub import download
from headwise.loading.loaded import check_encoder, check_loading
from headwise.loading.options import LoadOptions
from headwise.loading.progress import transformers_progress
from headwise.loading.source import check_folder, find_source
from headwise.loading.weight_files import weight_bytes
from headwise.spec import ModelSpec


class ModelFolder:
    """A folder whose config is read; what else is in it is read when it is asked for.

    Raises:
        LoadError: a config that is missing, damaged or unknown, or that needs code which is not
            trusted.
    """

    def __init__(self, folder: Path, options: LoadOptions | None = None) -> None:
        from transformers import AutoConfig

        from headwise.hf import HeadwiseMlaConfig  # noqa: F401  (importing it makes the type known)

        self.folder, self.options = folder, options or LoadOptions()
        self.config = self._read(AutoConfig, "config")

    @classmethod
    def find(cls, model: str | Path, options: LoadOptions) -> Self:
        """Open the folder of a model: itself, converted from GGUF, or downloaded.

        Raises:
            LoadError: no such model, not a model, or not safe to read.
        """
        folder = model_folder(model, weights=options.weights, progress=options.progress)
        return cls(folder, options)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer, "tokenizer")

    def load(self, *, context: int = 0, encoder: bool = False, **changes: Any) -> Any:
        """The model in evaluation mode, if its weights and a cache of `context` tokens fit.

        Args:
            context: tokens.
            encoder: an encoder without a head, instead of a causal language model.
            changes: options that are others than those that the folder was opened with.

        Raises:
            LoadError: damaged weights, or not such a model.
            CapacityError: weights and cache would not fit; says needed and available bytes.
        """
        from transformers import AutoModel, AutoModelForCausalLM

        options = replace(self.options, **changes)
        stage = "loading weights"
        if options.weights == "packed":
            return self._packed(options, context, stage)
        self._check_room(options, context)
        options.progress(stage, 0, 0)
        with transformers_progress(options.progress, stage):
            model, loading = self._read(
                AutoModel if encoder else AutoModelForCausalLM,
                "model",
                output_loading_info=True,
                config=self.config,
                dtype=options.torch_dtype or "auto",
                attn_implementation=options.attention,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused by name, as missing and unexpected ones are
            )
        check = check_encoder if encoder else check_loading
        check(self.folder, loading, model)
        return model.to(options.target).eval()

    def _packed(self, options: LoadOptions, context: int, stage: str) -> Any:
        """The model of weights in blocks of GGUF."""
        try:
            with one_line(f"{self.folder}: its model cannot be loaded", faults=ANYTHING):
                self._check_room(options, context)
                options.progress(stage, 0, 0)
                model = load_packed(self.folder, self.config, options)
        except LoadError as error:
            raise LoadError(f"{error}; remove that folder, it is made of the file again") from error
        return model.to(options.target).eval()

    def _check_room(self, options: LoadOptions, context: int) -> None:
        """Refuse weights and a cache of `context` tokens that would not fit in memory."""
        dtype = options.torch_dtype or getattr(self.config, "dtype", None)
        cache = cache_bytes(self.config, context, dtype or torch.float32)
        what = "loading the model" + (f" with a cache of {context} tokens" if context else "")
        weights = weight_bytes(self.folder, options.torch_dtype)
        check_memory(weights + cache, options.target, what)

    def _read(self, auto: Any, what: str, **options: Any) -> Any:
        """What an Auto class reads from the folder; whatever it raises for a bad one is one line.

        Raises:
            LoadError: says that `what`, the folder's config, tokenizer or model, cannot be loaded.
        """
        trust = self.options.trust_remote_code
        try:
            return auto.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=trust, **options
            )
        except (LoadError, CapacityError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Nothing narrower is right: for a bad file Transformers, tokenizers, safetensors,
            # sentencepiece and protobuf raise whatever their code stumbles over, plain Exceptions
            # and types of their own among it.
            text = reason(error)
            if "trust_remote_code" in str(error):
                text = (
                    f"{self.folder} needs code that comes with it; read that code, and if you "
                    "trust it pass --trust-remote-code (trust_remote_code=True)"
                )
            elif "Unrecognized configuration class" in text:
                text = (
                    f"{self.folder} is not a causal language model (decoder) that Transformers "
                    "knows"
                )
            else:
                text = f"{self.folder}: its {what} cannot be loaded: {text}"
            raise LoadError(text) from error


def model_folder(model: str | Path, *, weights: str = "float", progress: Progress = silent) -> Path:
    """The local folder with a model's files: itself, converted from GGUF, or downloaded.

    Raises:
        LoadError: no such model, not a model, or not safe to read; packed weights of no GGUF.
    """
    source = find_source(model)
    if source.kind == "gguf":
        return converted(Path(source.place).absolute(), weights=weights, progress=progress)
    if weights == "packed":
        raise LoadError(
            f'weights="packed" is for .gguf files, and {source.place} is none; load it, and '
            'headwise.attach(model, weights="int8") packs its weights'
        )
    if source.kind == "hub":
        folder = download(source.place, progress)
        check_folder(folder)
        return folder
    return Path(source.place)


def cache_bytes(config: Any, context: int, dtype: torch.dtype) -> int:
    """Bytes of a cache of `context` tokens; 0 for a family that has no spec yet."""
    if not context:
        return 0
    try:
        return int(ModelSpec.from_config(config).cache_bytes(context, 1, dtype))
    except SpecError:
        return 0  # stock attention runs such a model too, so this is no reason to refuse it

"""llama.cpp as a peer for whole models: a GGUF file as it is, its weights in as few bits as there.

The package xllamacpp is llama.cpp in one library. What it offers in Python is a server, which
samples its tokens and does not give all logits. The library exports llama.h too, and that is called
here: a step reads the token it is given and nothing else. llama.cpp rounds what it multiplies with
integer weights to 8 bits, so its logits are some way from those of Transformers, which has the same
weights dequantised.
"""

import ctypes
import importlib
import weakref
from ctypes import c_char_p, c_float, c_int32, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedError

LLAMA_CPP = "llama.cpp"
# Of the logits' norm. On random tokens SmolLM2's Q4_1 is 0.01 to 0.03 off and a Qwen2 of 1.5B in
# Q4_K_M 0.1, where another last token would be 0.07 and 0.35 off.
TOLERANCE = 0.2

_ERROR = 4  # a level of its log


# Structures of llama.h that are passed by value. They are longer here than there, which no callee
# sees, so that only the fields in use, the first ones, have to be told.
class _Batch(ctypes.Structure):
    _fields_ = (("all", c_void_p * 128),)


class _ModelParams(ctypes.Structure):
    _fields_ = (("devices", c_void_p), ("rest", c_void_p * 128))


class _ContextParams(ctypes.Structure):
    _fields_ = (("n_ctx", c_uint32), ("rest", c_void_p * 128))


_Log = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)

# Functions of llama.h: what each returns, then what it takes.
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, _Log, c_void_p),
    "llama_model_default_params": (_ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, _ModelParams),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_context_default_params": (_ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, _ContextParams),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_n_batch": (c_uint32, c_void_p),
    "llama_batch_get_one": (_Batch, c_void_p, c_int32),
    "llama_decode": (c_int32, c_void_p, _Batch),
    "llama_get_logits_ith": (ctypes.POINTER(c_float), c_void_p, c_int32),
    "llama_state_seq_get_size": (c_size_t, c_void_p, c_int32),
    "llama_free": (None, c_void_p),
}


@dataclass(frozen=True)
class LlamaCppModel:
    """A loaded GGUF file: the library, the model in it, and how many logits it gives.

    `log` takes what the library writes, and has to live as long as that.
    """

    library: Any
    handle: int
    vocabulary: int
    log: Any


class LlamaCppStepper:
    """One sequence in llama.cpp, read step by step as `generation.Stepper` reads.

    Args:
        model: what `load_gguf` returns.
        tokens: how many the sequence may have.
        threads: that compute.
    """

    def __init__(self, model: LlamaCppModel, tokens: int, threads: int) -> None:
        self._model, self._library = model, model.library
        self._tokens, self._threads = tokens, threads

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [1, S] in batches of llama.cpp's size; the last token's logits [1, vocabulary].

        Raises:
            RuntimeError: more tokens than the sequence may have, or one that the file lacks.
        """
        for tokens in ids[0].int().split(self._library.llama_n_batch(self._context)):
            batch = self._library.llama_batch_get_one(tokens.data_ptr(), len(tokens))
            status = self._library.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama.cpp cannot read the tokens: llama_decode gave {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        row = (c_float * self._model.vocabulary).from_address(ctypes.addressof(logits.contents))
        return torch.frombuffer(row, dtype=torch.float32).clone()[None]

    def cache_nbytes(self) -> int:
        """What the sequence takes when it is saved: keys and values of the tokens it holds."""
        return int(self._library.llama_state_seq_get_size(self._context, 0))

    @cached_property
    def _context(self) -> int:
        # made by the first step: what it allocates counts as that step's memory
        params = self._library.llama_context_default_params()
        params.n_ctx = self._tokens
        context = self._library.llama_init_from_model(self._model.handle, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no cache of {self._tokens} tokens for the model")
        weakref.finalize(self, self._library.llama_free, context)
        self._library.llama_set_n_threads(context, self._threads, self._threads)
        return int(context)


@cache
def load_gguf(file: Path | None) -> LlamaCppModel:
    """The model of a GGUF file, on the processor alone.

    Raises:
        UnsupportedError: xllamacpp is not installed, the model came from no GGUF file, or from one
            that llama.cpp does not read.
    """
    if file is None:
        raise UnsupportedError("llama.cpp is timed on a .gguf file only")
    library, errors = _library(), list[str]()

    @_Log
    def log(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    library.llama_log_set(log, None)
    params = library.llama_model_default_params()
    no_devices = (c_void_p * 1)()  # a list that ends at once: no GPU
    params.devices = ctypes.addressof(no_devices)
    handle = library.llama_model_load_from_file(str(file).encode(), params)
    if not handle:
        reason = errors[0] if errors else f"it cannot load {file.name}"
        raise UnsupportedError(f"llama.cpp refuses: {reason}")
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(handle))
    return LlamaCppModel(library, handle, vocabulary, log)


def _library() -> Any:
    """The library of xllamacpp, its functions of llama.h declared."""
    try:
        module = importlib.import_module("xllamacpp")
    except ImportError as error:
        raise UnsupportedError("xllamacpp is not installed: pip install xllamacpp") from error
    library = ctypes.CDLL(module.xllamacpp.__file__)
    for name, (returned, *taken) in _PROTOTYPES.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise UnsupportedError(f"this build of xllamacpp does not export {name}") from error
        function.restype, function.argtypes = returned, taken
    return library

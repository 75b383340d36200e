"""A whole model's ways to decode: headwise, and stock Transformers with each of its caches."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from headwise.bench import llamacpp_candidate, openvino_candidate
from headwise.bench.llamacpp_candidate import LLAMA_CPP, LlamaCppStepper, load_gguf
from headwise.bench.openvino_candidate import OPENVINO, OpenVinoStepper, compile_gguf
from headwise.errors import UnsupportedError
from headwise.generation.attention import select_attention
from headwise.generation.stepper import Stepper
from headwise.hf.packed import packed_formats
from headwise.hf.stock_names import StaticCache
from headwise.loading.model_folder import ModelFolder
from headwise.loading.options import LoadOptions

HEADWISE = "headwise"
REFERENCE = "stock-dynamic"
# On a .gguf file headwise runs on packed weights; this is it on those that the stock peers have.
HEADWISE_FLOAT = "headwise-float"
# Which have something else to run where a model came from a .gguf file.
GGUF_PEERS = (HEADWISE_FLOAT, OPENVINO, LLAMA_CPP)
# Of the logits' norm, with packed weights: rows are rounded to 8 bits, as llama.cpp rounds them.
PACKED_TOLERANCE = llamacpp_candidate.TOLERANCE
PEERS = (REFERENCE, "stock-static", *GGUF_PEERS)


class SdpaShapes(TorchFunctionMode):
    """Notes the shapes that PyTorch's attention is called with.

    Stock packs the query heads of a group as rows, or does not, by what mask there is; that decides
    how often keys and values are read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: tuple[list[int], list[int]] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.shapes = list(args[0].shape), list(args[1].shape)
        return function(*args, **(kwargs or {}))

    def last(self) -> str:
        """The last call in words, "" if there was none."""
        if self.shapes is None:
            return ""
        query, key = self.shapes
        return f"SDPA of query {query} on key {key}"


@dataclass(frozen=True)
class ModelCandidate:
    """One way to run a model; `stepper` makes one with an empty cache for that many tokens.

    `tolerance` is how far its logits may be from stock's, None for that of the model's dtype.
    """

    name: str
    how: str
    stepper: Callable[[int], Stepper | OpenVinoStepper | LlamaCppStepper]
    tolerance: float | None = None


def model_candidates(
    stock: Any, gguf: Path | None = None, *, packed: bool = True
) -> list[ModelCandidate]:
    """headwise and stock on one model's weights; `stock` is set to sdpa, or eager without it.

    On the file `gguf` that the model came from headwise has packed weights, unless they are not to
    be `packed`, and OpenVINO and llama.cpp read it.

    Raises:
        UnsupportedError: a model that headwise does not attach to.
    """
    # Modules and configs of its own, the weights shared.
    weights = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
    ours = copy.deepcopy(stock, weights)
    blocks = gguf if packed else None
    floats = ModelCandidate(
        HEADWISE if blocks is None else HEADWISE_FLOAT,
        _words(select_attention(ours, HEADWISE)),
        lambda tokens: Stepper(ours),
    )
    attention = "sdpa"
    try:
        select_attention(stock, attention)
    except UnsupportedError:
        attention = "eager"
        select_attention(stock, attention)
    return [
        *([floats] if blocks is None else [_packed(blocks, stock.dtype), floats]),
        ModelCandidate(REFERENCE, f"{attention}, dynamic cache", lambda tokens: Stepper(stock)),
        ModelCandidate(
            "stock-static",
            f"{attention}, static cache",
            lambda tokens: Stepper(stock, StaticCache(config=stock.config, max_cache_len=tokens)),
        ),
        ModelCandidate(
            OPENVINO,
            "OpenVINO GenAI's conversion of the .gguf file; logits checked to "
            f"{openvino_candidate.TOLERANCE:g}",
            lambda tokens: OpenVinoStepper(compile_gguf(gguf, torch.get_num_threads())),
            openvino_candidate.TOLERANCE,
        ),
        ModelCandidate(
            LLAMA_CPP,
            "xllamacpp's llama.cpp on the .gguf file, called by llama.h, its cache in float16; "
            f"logits checked to {llamacpp_candidate.TOLERANCE:g}",
            lambda tokens: LlamaCppStepper(load_gguf(gguf), tokens, torch.get_num_threads()),
            llamacpp_candidate.TOLERANCE,
        ),
    ]


def _packed(gguf: Path, dtype: torch.dtype) -> ModelCandidate:
    """headwise on the blocks of a file."""
    options = LoadOptions(
        dtype=str(dtype).removeprefix("torch."), attention="eager", weights="packed"
    )
    model = ModelFolder.find(gguf, options).load()
    groups = select_attention(model, HEADWISE)
    how = f"{_words(groups)}; weights packed in {', '.join(packed_formats(model)) or 'no blocks'}"
    return ModelCandidate(HEADWISE, how, lambda tokens: Stepper(model), PACKED_TOLERANCE)


def _words(groups: Iterable[object]) -> str:
    return "; ".join(map(str, groups))

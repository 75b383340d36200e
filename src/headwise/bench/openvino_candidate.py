"""OpenVINO as a peer for whole models: a GGUF file as OpenVINO GenAI converts it.

GenAI builds a graph of its own from the file, with weights of as few bits as there; OpenVINO runs
it with a cache of its own, by default of 8-bit integers. Its logits are therefore some way from
those of Transformers, which has the same weights dequantised.
"""

import importlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.errors import UnsupportedError

OPENVINO = "openvino"
# Of the logits' norm. SmolLM2's Q4_1 is 0.14 to 0.24 off on random tokens; another model's would
# be more than 1 off.
TOLERANCE = 0.5


class OpenVinoStepper:
    """One sequence on a compiled model, read step by step as `generation.Stepper` reads.

    Args:
        compiled: what `compile_gguf` returns.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._length = 0

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [1, S] at once; the last token's logits [1, vocabulary]."""
        length = self._length + ids.shape[1]
        self._request.infer(
            {
                "input_ids": ids.numpy(),
                "attention_mask": torch.ones(1, length, dtype=torch.int64).numpy(),
                "position_ids": torch.arange(self._length, length)[None].numpy(),
                "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
            }
        )
        self._length = length
        return torch.from_numpy(self._request.get_tensor("logits").data.copy())[:, -1]

    def cache_nbytes(self) -> None:
        """OpenVINO does not say."""


@cache
def compile_gguf(file: Path | None, threads: int) -> Any:
    """The model of a GGUF file, compiled for the processor.

    Raises:
        UnsupportedError: OpenVINO GenAI is not installed, the model came from no GGUF file, or from
            one that GenAI does not read.
    """
    if file is None:
        raise UnsupportedError("OpenVINO GenAI is timed on a .gguf file only")
    try:
        genai = importlib.import_module("openvino_genai")
        openvino = importlib.import_module("openvino")
        operators = importlib.import_module("openvino.opset13")
    except ImportError as error:
        reason = "openvino-genai is not installed: pip install openvino-genai"
        raise UnsupportedError(reason) from error
    with tempfile.TemporaryDirectory() as folder:
        # the graph is written beside the file
        linked = Path(folder) / "model.gguf"
        linked.symlink_to(file.resolve())
        try:
            genai.LLMPipeline(str(linked), "CPU", enable_save_ov_model=True)
        except (RuntimeError, IndexError) as error:  # a quantisation, a key that the file lacks
            reason = str(error).strip().splitlines()[-1]  # the first one is a place in its sources
            raise UnsupportedError(f"OpenVINO GenAI refuses: {reason}") from error
        core = openvino.Core()
        model = core.read_model(Path(folder) / "openvino_model.xml")
        _last_token_only(model, operators)
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        return core.compile_model(model, "CPU", options)


def _last_token_only(model: Any, operators: Any) -> None:
    """Multiply the vocabulary with the last hidden state alone, as GenAI does when it generates."""
    head = model.output("logits").get_node().input_value(0).get_node()
    begin, end, one = (torch.tensor([index]).numpy() for index in (-1, 2**63 - 1, 1))
    last = operators.slice(head.input_value(0), begin, end, one, one)
    head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()

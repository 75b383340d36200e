"""ONNX Runtime's GroupQueryAttention as a peer: one decoding step, which writes the cache in place.

The operator puts the step's own key and value into the cache before it attends. It is given those
of the last row, so that every run does the same work and gives the same result.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.bench.candidate import Bind, Candidate, first_line
from headwise.errors import UnsupportedError
from headwise.measure.inputs import Inputs

_KINDS = {torch.float32: "float", torch.float16: "float16", torch.int32: "int32"}
_INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
_OUTPUTS = ("output", "present_key", "present_value")


def _missing() -> str | None:
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install onnxruntime onnx"
    return None


def _build(inputs: Inputs) -> Bind:
    shape, spec, dtype = inputs.shape, inputs.shape.spec, inputs.tensors[0].dtype
    if shape.query_length > 1 or spec.head_dim != spec.value_dim:
        raise UnsupportedError("GroupQueryAttention is run here on one query, with D = V")
    if dtype not in _KINDS:
        raise UnsupportedError(f"GroupQueryAttention has no CPU kernel for {str(dtype)[6:]}")
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        session = _session(_tensors(inputs, lengths), spec.heads, spec.kv_heads)
    except (errors.Fail, errors.InvalidGraph, errors.NotImplemented) as error:
        raise UnsupportedError(f"ONNX Runtime refuses: {first_line(error)}") from error

    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        tensors = _tensors(inputs, lengths)
        binding = session.io_binding()
        for name in (*_INPUTS, *_OUTPUTS):
            add = binding.bind_input if name in _INPUTS else binding.bind_output
            tensor = tensors[name]
            kind = str(tensor.dtype).removeprefix("torch.")
            add(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

        def run() -> Tensor:
            session.run_with_iobinding(binding)
            # of one query, [B, 1, H * D] is [B, H, 1, D]
            return tensors["output"].view(inputs.tensors[0].shape)

        return run

    return bind


def _tensors(inputs: Inputs, lengths: Tensor) -> dict[str, Tensor]:
    """The operator's inputs and outputs by its own names; the cache is both."""
    query, key, value = inputs.tensors
    rows, last = torch.arange(len(lengths)), lengths.long() - 1
    query = query.flatten(1).unsqueeze(1)
    return {
        "query": query,
        "key": key[rows, :, last].flatten(1).unsqueeze(1),
        "value": value[rows, :, last].flatten(1).unsqueeze(1),
        "past_key": key,
        "past_value": value,
        "seqlens_k": lengths - 1,
        "total_sequence_length": lengths.max(),
        "output": torch.empty_like(query),
        "present_key": key,
        "present_value": value,
    }


def _session(tensors: dict[str, Tensor], heads: int, kv_heads: int) -> Any:
    """A session of one node for tensors of these shapes, with PyTorch's number of threads."""
    import onnxruntime
    from onnx import parser

    def declared(names: tuple[str, ...]) -> str:
        """The names with their types, as `float[1,1,96] query`."""
        return ", ".join(
            f"{_KINDS[tensors[name].dtype]}{list(tensors[name].shape) or ''} {name}"
            for name in names
        )

    model = parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        attention ({declared(_INPUTS)}) => ({declared(_OUTPUTS)}) {{
            {", ".join(_OUTPUTS)} = com.microsoft.GroupQueryAttention
                <num_heads = {heads}, kv_num_heads = {kv_heads}> ({", ".join(_INPUTS)})
        }}"""
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on spinning in the next candidate's time
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


ONNXRUNTIME = Candidate(
    "onnxruntime", "ONNX Runtime's GroupQueryAttention", _build, missing=_missing
)

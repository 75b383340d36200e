"""ONNX Runtime's GroupQueryAttention as a peer: one decoding step, which writes the cache in place.

The operator puts the step's own key and value into the cache before it attends. It is given those
that the last row holds already, so that every run does the same work and gives the same result.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwise.bench.candidate import Absent, Bind, Candidate, first_line
from headwise.measure.inputs import AttentionInputs
from headwise.measure.shape import Shape

_DTYPES = (torch.float32, torch.float16)
_INPUTS = ("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length")
_OUTPUTS = ("output", "present_key", "present_value")


def _missing() -> str | None:
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install onnxruntime onnx"
    return None


def _build(shape: Shape, inputs: AttentionInputs) -> Bind | Absent:
    spec, dtype = shape.spec, inputs.query.dtype
    if shape.query_length > 1 or spec.head_dim != spec.value_dim:
        return Absent("GroupQueryAttention is run here on one query, with D = V")
    if dtype not in _DTYPES:
        return Absent(f"GroupQueryAttention has no CPU kernel for {str(dtype)[6:]}")
    lengths = torch.tensor(shape.lengths, dtype=torch.int32)
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    try:
        session = _session(_tensors(inputs, lengths), spec.heads, spec.kv_heads)
    except (errors.Fail, errors.InvalidGraph, errors.NotImplemented) as error:
        return Absent(f"ONNX Runtime refuses: {first_line(error)}")

    def bind(given: AttentionInputs) -> Callable[[], Tensor]:
        tensors = _tensors(given, lengths)
        binding = session.io_binding()
        for name in (*_INPUTS, *_OUTPUTS):
            add = binding.bind_input if name in _INPUTS else binding.bind_output
            tensor = tensors[name]
            kind = str(tensor.dtype).removeprefix("torch.")
            add(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())

        def run() -> Tensor:
            session.run_with_iobinding(binding)
            # of one query, [B, 1, H * D] is [B, H, 1, D]
            return tensors["output"].view(given.query.shape)

        return run

    return bind


def _tensors(given: AttentionInputs, lengths: Tensor) -> dict[str, Tensor]:
    """The operator's inputs and outputs by its own names; the cache is both."""
    batch = given.query.shape[0]
    rows, last = torch.arange(batch), lengths.long() - 1
    query = given.query.view(batch, 1, -1)
    return {
        "query": query,
        "key": given.key[rows, :, last].reshape(batch, 1, -1),
        "value": given.value[rows, :, last].reshape(batch, 1, -1),
        "past_key": given.key,
        "past_value": given.value,
        "seqlens_k": lengths - 1,
        "total_sequence_length": lengths.max(),
        "output": torch.empty_like(query),
        "present_key": given.key,
        "present_value": given.value,
    }


def _session(tensors: dict[str, Tensor], heads: int, kv_heads: int) -> Any:
    """A session of one node for tensors of these shapes, with PyTorch's number of threads."""
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.int32: TensorProto.INT32,
    }
    infos = {
        name: helper.make_tensor_value_info(name, kinds[tensor.dtype], list(tensor.shape))
        for name, tensor in tensors.items()
    }
    node = helper.make_node(
        "GroupQueryAttention",
        _INPUTS,
        _OUTPUTS,
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [infos[name] for name in _INPUTS],
        [infos[name] for name in _OUTPUTS],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would go on spinning in the next candidate's time
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


ONNXRUNTIME = Candidate("onnxruntime", "ONNX Runtime's GroupQueryAttention", _missing, _build)

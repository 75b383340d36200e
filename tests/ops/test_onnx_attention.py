"""All Attention operator cases that the `onnx` package carries, through `headwise.attention`.

ONNX's operator is adapted to our contract here: 3D inputs are split into heads, the past is
concatenated, masks shorter than the context are padded with "hidden", and is_causal (which ONNX
aligns to the first key after the past, we to the last key) becomes a mask where the two differ.
"""

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from headwise import attention
from headwise.ops import attention_weights

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "node"
NAMES = sorted(
    path.name
    for path in FOLDER.glob("test_attention_*")
    if path.is_dir() and not path.name.endswith("_expanded")
)
QK_OUTPUT = "qk_matmul_output"
# Cases whose qk_matmul_output is not compared. None: every mode follows from log(weights) + lse.
NOT_COMPARED: tuple[str, ...] = ()


@dataclass
class Case:
    """One case: the arguments of `attention`, and what ONNX expects."""

    query: Tensor
    key: Tensor
    value: Tensor
    expected: dict[str, Tensor]
    three_dims: bool
    qk_mode: int
    past: int
    is_causal: bool
    options: dict = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """A score is a sum of D products and an output one of L, rounded on both sides: D + L eps.

        The values are of order 1, so it serves as absolute and as relative tolerance.
        """
        terms = self.query.shape[3] + self.key.shape[2]
        return terms * torch.finfo(self.query.dtype).eps


def load(name: str) -> Case:
    model = onnx.load(FOLDER / name / "model.onnx")
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    # one we do not adapt would be ignored silently
    assert set(attributes) <= {
        *("is_causal", "kv_num_heads", "q_num_heads", "scale"),
        *("softcap", "softmax_precision", "qk_matmul_output_mode"),
    }
    # we compute the softmax in float32 or better, which is ONNX's FLOAT (1) or DOUBLE (11)
    assert attributes.get("softmax_precision", 1) in (1, 11)
    graph_names = [i.name for i in model.graph.input]
    inputs = dict(zip(graph_names, read(name, "input", len(graph_names)), strict=True))
    graph_names = [o.name for o in model.graph.output]
    expected = dict(zip(graph_names, read(name, "output", len(graph_names)), strict=True))
    query, key, value = inputs.pop("Q"), inputs.pop("K"), inputs.pop("V")
    three_dims = query.ndim == 3
    if three_dims:
        query = split(query, attributes["q_num_heads"])
        key, value = (split(t, attributes["kv_num_heads"]) for t in (key, value))
    past = 0
    if "past_key" in inputs:
        past_key, past_value = inputs.pop("past_key"), inputs.pop("past_value")
        past = past_key.shape[2]
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    case = Case(
        *(query, key, value, expected, three_dims),
        qk_mode=attributes.get("qk_matmul_output_mode", 0),
        past=past,
        is_causal=bool(attributes.get("is_causal", 0)),
    )
    if "scale" in attributes:
        case.options["scale"] = attributes["scale"]
    if attributes.get("softcap", 0.0) > 0:
        case.options["softcap"] = attributes["softcap"]
    if "nonpad_kv_seqlen" in inputs:
        case.options["kv_lengths"] = inputs.pop("nonpad_kv_seqlen")
    if "attn_mask" in inputs:
        mask = inputs.pop("attn_mask")
        is_bool = mask.dtype == torch.bool
        missing = key.shape[2] - mask.shape[-1]
        hidden = False if is_bool else float("-inf")
        mask = torch.nn.functional.pad(mask, (0, missing), value=hidden)
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
        case.options["mask" if is_bool else "bias"] = mask
    if case.is_causal:
        length, context = query.shape[2], key.shape[2]
        if past + length == context:
            case.options["causal"] = True
        else:
            last = past + torch.arange(length).view(1, 1, -1, 1)
            before = torch.arange(context) <= last
            case.options["mask"] = before & case.options.get("mask", torch.tensor(True))
    assert not inputs
    return case


def read(name: str, kind: str, count: int) -> list[Tensor]:
    folder = FOLDER / name / "test_data_set_0"
    tensors = []
    for index in range(count):
        proto = onnx.TensorProto.FromString((folder / f"{kind}_{index}.pb").read_bytes())
        tensors.append(torch.from_numpy(numpy_helper.to_array(proto).copy()))
    return tensors


def split(tensor: Tensor, heads: int) -> Tensor:
    """[B, S, heads * dim] as [B, heads, S, dim]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_the_package_carries_64_cases():
    assert onnx.__version__ == "1.22.0"
    assert len(NAMES) == 64


@pytest.mark.parametrize("backend", ["torch", "reference", None])  # None: C++ where it serves
@pytest.mark.parametrize("name", NAMES)
def test_output_matches_onnx(name: str, backend: str | None):
    case = load(name)
    out = attention(case.query, case.key, case.value, backend=backend, **case.options)
    if case.three_dims:
        out = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(
        out, case.expected["Y"], atol=case.tolerance, rtol=case.tolerance, equal_nan=False
    )


@pytest.mark.parametrize("name", [name for name in NAMES if "with_past_and_present" in name])
def test_present_is_the_past_and_the_new_tokens(name: str):
    case = load(name)
    assert case.past > 0
    assert torch.equal(case.key, case.expected["present_key"])
    assert torch.equal(case.value, case.expected["present_value"])


@pytest.mark.parametrize("backend", ["torch", "reference", None])  # None: C++ where it serves
@pytest.mark.parametrize("name", [name for name in NAMES if "causal" in name])
def test_onnx_causality_is_ours_on_the_keys_up_to_the_last_query(name: str, backend: str | None):
    # the same cases without a mask of ours: there, both rules put the last query on the last key
    case = load(name)
    assert case.is_causal
    lengths = torch.full((case.query.shape[0],), case.past + case.query.shape[2])
    options = {**case.options, "causal": True, "kv_lengths": lengths}
    del options["mask"]
    out = attention(case.query, case.key, case.value, backend=backend, **options)
    if case.three_dims:
        out = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(
        out, case.expected["Y"], atol=case.tolerance, rtol=case.tolerance, equal_nan=False
    )


def cases_with_qk_output() -> list[str]:
    names = []
    for name in NAMES:
        graph = onnx.load(FOLDER / name / "model.onnx", load_external_data=False).graph
        if QK_OUTPUT in [output.name for output in graph.output]:
            names.append(name)
    return names


WITH_QK = cases_with_qk_output()
COMPARED = [name for name in WITH_QK if name not in NOT_COMPARED]


def test_only_the_listed_qk_outputs_are_not_compared():
    assert len(WITH_QK) == 14
    assert sorted(set(WITH_QK) - set(COMPARED)) == sorted(NOT_COMPARED)
    assert {load(name).qk_mode for name in COMPARED} == {0, 1, 2, 3}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", COMPARED)
def test_qk_output_matches_onnx(name: str, backend: str):
    case = load(name)
    options = dict(case.options)
    # modes 0 and 1 are the scores before masks, 0 before the cap too
    if case.qk_mode < 2:
        options = {k: o for k, o in options.items() if k not in ("mask", "bias", "causal")}
    if case.qk_mode == 0:
        options.pop("softcap", None)
    weights = attention_weights(case.query, case.key, **options)
    if case.qk_mode == 3:
        given = weights
    else:
        lse = attention(
            case.query, case.key, case.value, return_lse=True, backend=backend, **options
        )[1]
        given = torch.log(weights) + lse.unsqueeze(-1)
    torch.testing.assert_close(
        given, case.expected[QK_OUTPUT], atol=case.tolerance, rtol=case.tolerance, equal_nan=False
    )

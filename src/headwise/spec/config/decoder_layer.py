"""How a family's decoder layer is made: which modules it has, and what they compute, as data."""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms wide", "rms plus one", "layer"]
Rotation = Literal["halves", "halves once", "neighbours", "neighbours twice"]


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """Norm, attention, residual, norm, MLP, residual, by the names of Transformers' modules.

    Args:
        name: the class of the layer.
        norm: by the root mean square, times the weight or 1 + the weight; or LayerNorm. The first
            rounds to the dtype before it multiplies, "rms wide" behind.
        before_attention, after_attention, before_mlp, after_mlp: the layer's norms; None: it
            does not have one there.
        attention, mlp: the layer's modules.
        qkv: of the attention, the projections whose outputs are in turn queries, keys and values.
        out: of the attention, the projection of its output.
        head_norms: of the attention, the norms of each head of queries and of keys, or of all
            heads at once, as their weights are long.
        rotates: an attribute of the attention that says whether this layer rotates at all.
        rotation: which dims are rotated together: the two halves of a head, or neighbours. A row
            of angles has those of the pairs and then the same again; with "once" not again; with
            "twice" each two times, side by side.
        window: whether the attention hands its window on; else it is in the masks alone.
        softcap: an attribute of the attention: the cap of its scores.
        sinks: an attribute of the attention: a learned score of each head.
        gate, up, down: of the MLP. gate and up may be one, the gate first. None: no gate.
        activation: of the MLP. An MLP without these, as a mixture of experts, runs as the module
            that it is.
        routes: whether such a module returns its router's scores as well.
        parallel: whether the MLP is given what the attention is given: both are added to the input.
        scale: an attribute of the layer, by which what is added to the input is multiplied.
    """

    name: str
    norm: NormKind = "rms"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    head_norms: tuple[str, str] | None = None
    rotates: str | None = None
    rotation: Rotation = "halves"
    window: bool = True
    softcap: str | None = None
    sinks: str | None = None
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    routes: bool = False
    parallel: bool = False
    scale: str | None = None

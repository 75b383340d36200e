"""How a family's decoder layer is made: which modules it has, and what they compute, as data."""

from dataclasses import dataclass
from typing import Literal

NormKind = Literal["rms", "rms plus one", "layer"]


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """Norm, attention, residual, norm, MLP, residual, by the names of Transformers' modules.

    Args:
        name: the class of the layer.
        norm: by the root mean square, times the weight or 1 + the weight; or LayerNorm.
        before_attention, after_attention, before_mlp, after_mlp: the layer's norms; None: it
            does not have one there.
        attention, mlp: the layer's modules.
        qkv: of the attention, the projections whose outputs are in turn queries, keys and values.
        out: of the attention, the projection of its output.
        head_norms: of the attention, the norms of each head of queries and of keys.
        rotates: an attribute of the attention that says whether this layer rotates at all.
        interleaved: whether neighbouring dims are rotated as a pair, not the two halves.
        softcap: an attribute of the attention: the cap of its scores.
        gate, up, down: of the MLP. gate and up may be one, the gate first. None: no gate.
        activation: of the MLP.
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
    interleaved: bool = False
    softcap: str | None = None
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    parallel: bool = False
    scale: str | None = None

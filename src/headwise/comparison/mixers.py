"""What each mechanism has in its layers: attention, states, or a pattern of both."""

import re
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from headwise.errors import OptionError
from headwise.nn.decoder import Mixing
from headwise.spec import AttentionSpec, SparseChoice, StateSpec
from headwise.spec.mechanism import with_mechanism

# Beside the mechanisms of attention.
NAMES = ("gated-delta", "kda", "ssd", "retention", "topk:K", "window:W", "memory:W", "hybrid:A-B")
_TOPK = re.compile(r"topk:([1-9][0-9]{0,8})")
_WINDOW = re.compile(r"(window|memory)(?::([1-9][0-9]{0,8}))?")
_HYBRID = re.compile(r"hybrid:([1-9][0-9]?)-([1-9][0-9]?)")
_CONVOLUTION = 4
# What each layer holds at equal bytes, of what MHA does.
_SHARE = 4
# How far from that rounding to whole rows may lead.
_APART = 1 / 8


@dataclass(frozen=True)
class Remembering:
    """Attention in a window, and a memory of all that it has read."""

    attention: AttentionSpec

    def cache_bytes(self, context: int, *, dtype: str) -> int:
        """What the window holds, and the memory besides."""
        remembered = replace(self.attention, window=None)
        return sum(each.cache_bytes(context, dtype=dtype) for each in (self.attention, remembered))

    def __str__(self) -> str:
        return f"{self.attention}, and a memory"


Mixer: TypeAlias = Mixing | Remembering


def mixers(
    plain: AttentionSpec, name: str, layers: int, tokens: int | None, window: int = 16
) -> tuple[Mixer, ...]:
    """The layers of a decoder; with `tokens`, each holds a quarter of what MHA holds after those.

    States have the heads of `plain` and their dims: "gated-delta" and "kda" D x D, "ssd" 2 D x D
    with one key for all heads, as Mamba-2. RetNet's heads are fewer and larger: "retention" has
    half of them, 2 D x 4 D. "topk:16" is mha, trained as such, whose queries otherwise get the 16
    keys alone that weigh most by a sketch. "window:16" is mha in a window of 16, or without a
    number of `window`, and "memory:16" the same with a memory of the rest. "hybrid:3-1" is three
    layers of gated-delta and one of mha, repeated; the last repeat may be cut off.

    At equal bytes the dims of attention's heads change, the rank of MLA's latent, and the rows of a
    state.

    >>> plain = AttentionSpec(heads=8, kv_heads=8, head_dim=8, value_dim=8)
    >>> print(*mixers(plain, "hybrid:1-1", 2, None), sep="; ")
    gated delta rule 8 heads, state 8 x 8; MHA 8 heads, D 8
    >>> for name in ("mha", "mqa", "mla", "gated-delta"):
    ...     (layer,) = mixers(plain, name, 1, tokens=128)
    ...     print(layer, layer.cache_bytes(128, dtype="float32"))
    MHA 8 heads, D 2 16384
    MQA 8/1 heads, D 16 16384
    MLA 8 heads, R 28 + P 4 16384
    gated delta rule 8 heads, state 30 x 8 16384

    Raises:
        OptionError: an unknown name, one that these heads or layers cannot have, or one that cannot
            hold as many bytes.
    """
    if not name.startswith("hybrid"):
        return (_layer(plain, name, tokens, window),) * layers
    match = _HYBRID.fullmatch(name)
    if match is None:
        raise OptionError(
            f"mechanism {name!r}: expected hybrid:A-B with A and B of 1 to 99, as hybrid:3-1"
        )
    states, attentions = int(match[1]), int(match[2])
    if layers < states + attentions:
        raise OptionError(
            f"{name} repeats {states + attentions} layers, and layers is {layers}; give as many or "
            "more"
        )
    pattern = ["gated-delta"] * states + ["mha"] * attentions
    each = {kind: _layer(plain, kind, tokens, window) for kind in set(pattern)}
    return tuple(each[pattern[index % len(pattern)]] for index in range(layers))


def _layer(plain: AttentionSpec, name: str, tokens: int | None, window: int) -> Mixer:
    if match := _WINDOW.fullmatch(name):
        if tokens is not None:
            raise OptionError(f"{name} at equal bytes: what it holds is its window's; leave it out")
        near = replace(plain, window=int(match[2] or window))
        return near if match[1] == "window" else Remembering(near)
    if match := _TOPK.fullmatch(name):
        if tokens is not None:
            raise OptionError(f"{name} at equal bytes: it holds what mha holds; leave it out")
        most = int(match[1])
        return replace(plain, sparse=SparseChoice(most, most, sinks=0, recent=1, dense=0))
    if name in NAMES:
        return _state(plain, name) if tokens is None else _state_of(plain, name, tokens)
    spec = with_mechanism(plain, name, others=NAMES)
    if tokens is None:
        return spec
    held = plain.cache_elements_per_token // _SHARE
    if spec.latent_rank is not None and spec.rope_dim is not None:
        if ":" in name:
            raise OptionError(f"{name} at equal bytes: expected mla, whose latent they determine")
        if held <= spec.rope_dim:
            raise OptionError(
                f"mla at equal bytes has {held} numbers per token, all of them the rotary key's; "
                "give more heads"
            )
        return with_mechanism(plain, f"mla:{held - spec.rope_dim}")
    dim, rest = divmod(held, 2 * spec.kv_heads)
    if rest or dim < 2 or dim % 2:
        raise OptionError(
            f"{name} at equal bytes has {held / 2 / spec.kv_heads:g} dims of a head, expected an "
            f"even number; give a width that is a multiple of {8 * plain.heads}"
        )
    return with_mechanism(replace(plain, head_dim=dim, value_dim=dim, scale=dim**-0.5), name)


def _state(plain: AttentionSpec, name: str, rows: int | None = None) -> StateSpec:
    heads, dim = plain.heads, plain.head_dim
    rows = rows or (dim if name in ("gated-delta", "kda") else 2 * dim)
    if name == "retention":
        sizes: dict[str, Any] = {"heads": max(1, heads // 2), "key_dim": rows, "value_dim": 4 * dim}
        return StateSpec(delta=False, decay="fixed", **sizes)
    key_heads = 1 if name == "ssd" else heads
    return StateSpec(
        conv_channels=2 * key_heads * rows + heads * dim,
        conv_width=_CONVOLUTION,
        heads=heads,
        key_dim=rows,
        value_dim=dim,
        key_heads=key_heads,
        delta=name != "ssd",
        decay="dim" if name == "kda" else "head",
    )


def _state_of(plain: AttentionSpec, name: str, tokens: int) -> StateSpec:
    """A state that holds a share of what MHA does after `tokens`, as nearly as whole rows can."""
    wanted = plain.cache_bytes(tokens, dtype="float32") / _SHARE
    step = 2 if name == "retention" else 1  # rows are rotated in pairs
    one, two = (_state(plain, name, rows).nbytes(1, "float32") for rows in (step, 2 * step))
    state = _state(plain, name, step * max(1, round((wanted - one) / (two - one) + 1)))
    nearest = state.nbytes(1, "float32")
    if abs(nearest - wanted) > _APART * wanted:
        raise OptionError(
            f"{name} at equal bytes holds {nearest:,} bytes at best, expected {wanted:,.0f}; give "
            "longer sequences (pairs or length)"
        )
    return state

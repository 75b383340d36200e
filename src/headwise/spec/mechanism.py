"""The mechanisms by the names that people type: mha, gqa:2, mqa, mla, mla:24."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace

from headwise.errors import OptionError
from headwise.spec.attention import AttentionSpec

_NAME = re.compile(r"(mha|mqa|mla)|(gqa|mla)[:-]([0-9]{1,9})")
_KNOWN = "mha, gqa:K, mqa, mla, mla:R (K kv heads, a latent of R)"


def mechanism_name(name: str) -> str:
    """A name in its one spelling; any other text as it is.

    >>> mechanism_name("gqa-2"), mechanism_name("gqa:2")
    ('gqa:2', 'gqa:2')
    """
    return name.replace("-", ":") if _NAME.fullmatch(name) else name


def with_mechanism(spec: AttentionSpec, name: str, others: Sequence[str] = ()) -> AttentionSpec:
    """The layer with its query heads, and with the keys and values of another mechanism.

    "gqa:2" has 2 kv heads, "mqa" 1 and "mha" as many as query heads. "mla" has the proportions of
    DeepSeek-V2: a latent of R = 4 D, and a rotary key of P = D / 2 beside the D dimensions of each
    head; "mla:24" has a latent of 24. "gqa-2" and "mla-24" are old spellings of the same. A scale
    that follows from D follows it here too. `others` are names that the caller knows beside these,
    for the error.

    >>> spec = AttentionSpec(heads=8, kv_heads=8, head_dim=16, value_dim=16)
    >>> print(with_mechanism(spec, "gqa:2"))
    GQA 8/2 heads, D 16
    >>> print(with_mechanism(spec, "mla"))
    MLA 8 heads, R 64 + P 8

    Raises:
        OptionError: an unknown name, or kv heads that do not divide the heads.

    Source: https://arxiv.org/abs/2405.04434, table 1.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        known = ", ".join((_KNOWN, *others))
        raise OptionError(f"mechanism {name!r} is unknown; {_hint(name, others)}Known are {known}")
    kind, number = match[1] or match[2], match[3]
    if kind == "mla":
        return _latent(spec, mechanism_name(name), int(number or 4 * spec.head_dim))
    kv_heads = spec.heads if kind == "mha" else int(number or 1)
    if kv_heads < 1 or spec.heads % kv_heads:
        divisors = [count for count in range(1, spec.heads + 1) if spec.heads % count == 0]
        raise OptionError(
            f"{mechanism_name(name)} has {kv_heads} kv heads, which do not divide {spec.heads} "
            f"heads; use one of " + ", ".join(f"gqa:{count}" for count in divisors)
        )
    return replace(
        spec, kv_heads=kv_heads, latent_rank=None, rope_dim=None, query_rank=None, indexer=None
    )


def _latent(spec: AttentionSpec, name: str, rank: int) -> AttentionSpec:
    if rank < 1:
        raise OptionError(f"{name} has a latent of {rank}, expected at least 1")
    rope_dim = max(1, spec.head_dim // 2)
    by_size = spec.scale == spec.head_dim**-0.5
    head_dim = spec.head_dim + rope_dim
    return replace(
        spec,
        kv_heads=spec.heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if by_size else spec.scale,
        latent_rank=rank,
        rope_dim=rope_dim,
        sparse=None,
    )


def _hint(name: str, others: Sequence[str]) -> str:
    if close := difflib.get_close_matches(name.lower(), others, n=1, cutoff=0.7):
        return f"did you mean {close[0]}? "
    kind = re.split("[:-]", name.lower())[0]
    near = difflib.get_close_matches(kind, ["mha", "mla", "mqa", "gqa"], n=1, cutoff=0.5)
    return f"did you mean {near[0]}{':2' if near[0] == 'gqa' else ''}? " if near else ""

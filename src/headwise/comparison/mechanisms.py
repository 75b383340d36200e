"""The mechanisms by name, and the feed-forward width that makes their decoders equally large."""

import difflib
import re

from headwise.errors import OptionError
from headwise.spec import AttentionSpec

KNOWN = ("mha", "gqa-K", "mqa", "mla", "mla-R")
DEFAULT = ("mha", "gqa-2", "mqa", "mla")


def parse(name: str, heads: int, head_dim: int) -> AttentionSpec:
    """The attention that a name stands for, with H `heads` of D = `head_dim`.

    >>> print(parse("gqa-2", 8, 16))
    GQA 8/2 heads, D 16
    >>> print(parse("mla", 8, 16))
    MLA 8 heads, R 64 + P 8

    "gqa-2" has 2 kv heads. "mla" has DeepSeek-V2's proportions, a latent of 4 D and a rotary key of
    D / 2 beside it; "mla-24" a latent of 24.

    Raises:
        OptionError: an unknown name, or kv heads that do not divide the heads.
    """
    plain = AttentionSpec(heads=heads, kv_heads=heads, head_dim=head_dim, value_dim=head_dim)
    kind, _, number = name.partition("-")
    if name == "mha":
        return plain
    if name == "mqa":
        return _shared(name, plain, 1)
    if kind == "gqa" and re.fullmatch("[0-9]+", number):
        return _shared(name, plain, int(number))
    if name == "mla" or (kind == "mla" and re.fullmatch("[0-9]+", number)):
        return _latent(name, plain, int(number) if number else 4 * head_dim)
    raise OptionError(f"mechanism {name!r} is unknown; {_meant(kind)}")


def _shared(name: str, plain: AttentionSpec, kv_heads: int) -> AttentionSpec:
    if kv_heads < 1 or plain.heads % kv_heads:
        raise OptionError(
            f"{name} has {kv_heads} kv heads, which do not divide {plain.heads} heads; use one of "
            + ", ".join(f"gqa-{at}" for at in range(1, plain.heads + 1) if plain.heads % at == 0)
        )
    dim = plain.head_dim
    return AttentionSpec(heads=plain.heads, kv_heads=kv_heads, head_dim=dim, value_dim=dim)


def _latent(name: str, plain: AttentionSpec, rank: int) -> AttentionSpec:
    if rank < 1:
        raise OptionError(f"{name} has a latent of {rank}, expected at least 1")
    rope = plain.head_dim // 2
    return AttentionSpec(
        heads=plain.heads,
        kv_heads=plain.heads,
        head_dim=plain.head_dim + rope,
        value_dim=plain.head_dim,
        latent_rank=rank,
        rope_dim=rope,
    )


def _meant(kind: str) -> str:
    near = difflib.get_close_matches(kind.lower(), ["mha", "mla", "mqa", "gqa"], n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}{'-2' if near[0] == 'gqa' else ''}? " if near else ""
    return f"{meant}Known are {', '.join(KNOWN)} (K kv heads, a latent of R)"

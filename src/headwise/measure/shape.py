"""What one benchmark of an operator computes: a layer's attention, a batch, queries and a context.

Written `decode:32/8:d128:16k`: a kind and its parts, joined by colons, the parts in any order.
PARTS lists them.
"""

import itertools
import re
from dataclasses import dataclass, replace

from headwise.errors import OptionError, SpecError
from headwise.ops import Bits, row_bytes
from headwise.spec import AttentionSpec

KINDS = ("decode", "prefill", "mla")
SYNTAX = "kind:heads:dims:context, as decode:32/8:d128:16k, prefill:32/8:d128:2k or mla:16:8k"

PARTS = (
    ("decode, prefill", "one query; as many queries as tokens"),
    ("mla", "one query on cached latents, absorbed"),
    ("32/8", "query heads / kv heads; 32 alone is multi-head"),
    ("d128, d192/128", "head dim of query and key / of value; for mla the dims N / V (d128)"),
    ("r512+64", "for mla: latent rank + rope dim (r512+64)"),
    ("16k, 8000", "context in tokens, k = 1024"),
    ("b8", "batch (b1)"),
    ("s4", "queries, where the kind does not say it"),
    ("ragged", "unequal contexts that average to the one given, beside equal ones"),
    ("vs8k", "beside the same shape at another context"),
    ("vs1t", "beside the same shape with another number of threads"),
)

_PATTERNS = {
    "heads": r"(\d+)(?:/(\d+))?",
    "dims": r"d(\d+)(?:/(\d+))?",
    "latent": r"r(\d+)\+(\d+)",
    "context": r"(\d+)k|(\d+)",
    "batch": r"b(\d+)",
    "queries": r"s(\d+)",
    "ragged": r"ragged",
    "vs_context": r"vs(?:(\d+)k|(\d+))",
    "vs_threads": r"vs(\d+)t",
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One call of an operator, without its dtype.

    >>> shape = parse_shape("decode:32/8:d128:16k")
    >>> print(shape.spec, shape.context)
    GQA 32/8 heads, D 128 16384
    >>> shape.bytes(2) // 2**20, shape.flops
    (64, 268435456)

    Args:
        spec: the layer's attention.
        context: L, tokens that each sequence holds (with `ragged` on average).
        query_length: S; query S - 1 sits on the last token.
        batch: B, sequences.
        ragged: whether the sequences hold unequal numbers of tokens.
        vs_context: another context to time beside this one.
        vs_threads: another number of threads to time beside the run's.

    Raises:
        OptionError: a combination that cannot be run.
    """

    spec: AttentionSpec
    context: int
    query_length: int = 1
    batch: int = 1
    ragged: bool = False
    vs_context: int | None = None
    vs_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "query_length", "batch", "vs_context", "vs_threads"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise OptionError(f"shape {self}: {name} is {given}, expected at least 1")
        if self.query_length > min(self.lengths):
            raise OptionError(
                f"shape {self}: {self.query_length} queries on {min(self.lengths)} tokens; "
                "expected at most as many queries as tokens"
            )
        if self.ragged and self.batch < 2:
            raise OptionError(f"shape {self}: ragged needs several sequences; add b8")
        beside = (self.ragged, self.vs_context is not None, self.vs_threads is not None)
        if sum(beside) > 1:
            raise OptionError(f"shape {self}: give one of ragged, vs8k and vs1t, not several")
        if self.vs_context is not None and self.query_length > self.vs_context:
            raise OptionError(f"shape {self}: more queries than vs{self.vs_context} has tokens")

    @property
    def latent(self) -> bool:
        """Whether this is attention over cached latents (`headwise.latent_attention`)."""
        return self.spec.mechanism == "MLA"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence holds, batch * context in all.

        >>> parse_shape("decode:4:d8:16:b4:ragged").lengths
        (4, 12, 20, 28)
        """
        if not self.ragged:
            return (self.context,) * self.batch
        ends = [self.context * at * at // self.batch for at in range(self.batch + 1)]
        return tuple(end - start for start, end in itertools.pairwise(ends))

    @property
    def tokens(self) -> int:
        """Cached tokens that one call reads, over all sequences."""
        return sum(self.lengths)

    @property
    def flops(self) -> int:
        """Floating-point operations that the call needs: 2 a multiply-add, softmax not counted.

        Scores and sums are counted where the causal rule lets a query see a key; for latents in the
        absorbed form, with the folding of both projections.
        """
        spec, queries = self.spec, self.query_length
        if not self.latent:
            return sum(spec.flops(queries, length) for length in self.lengths)
        absorbed = spec.absorbed()
        folding = self.batch * queries * absorbed.value_dim * (spec.nope_dim + spec.value_dim)
        attended = sum(absorbed.flops(queries, length) for length in self.lengths)
        return attended + 2 * spec.heads * folding

    def bytes(self, itemsize: int, bits: Bits | None = None) -> int:
        """Bytes that the call must move at least: cache, query and output once; MLA's weights.

        With `bits` the cache is of such integers and their scales.
        """
        spec = self.spec
        rows = self.batch * self.query_length * spec.heads * (spec.head_dim + spec.value_dim)
        cached = self.tokens * spec.cache_elements_per_token
        weights = 0
        if self.latent:
            weights = spec.heads * spec.absorbed().value_dim * (spec.nope_dim + spec.value_dim)
        if bits is None:
            return itemsize * (cached + rows + weights)
        cached_rows = spec.cache_rows
        token = cached_rows.heads * sum(row_bytes(dim, bits) for dim in cached_rows.dims)
        return self.tokens * token + itemsize * (rows + weights)

    def beside(self, threads: int) -> "Beside | None":
        """What is timed beside this shape, None if nothing is."""
        plain = replace(self, ragged=False, vs_context=None, vs_threads=None)
        if self.ragged:
            return Beside("equal lengths", plain, threads)
        if self.vs_context is not None:
            context = self.vs_context
            queries = context if self.query_length == self.context > 1 else self.query_length
            plain = replace(plain, context=context, query_length=queries)
            return Beside(f"{context:,} tokens", plain, threads)
        if self.vs_threads is not None:
            plural = "s" if self.vs_threads > 1 else ""
            return Beside(f"{self.vs_threads} thread{plural}", plain, self.vs_threads)
        return None

    def describe(self) -> str:
        """In words: `decode, GQA 32/8 heads, D 128, 16,384 tokens, batch 8`."""
        parts = [str(self.spec), f"{self.context:,} tokens"]
        if self.latent:
            parts.insert(1, f"N {self.spec.nope_dim}, V {self.spec.value_dim}")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        if self.ragged:
            parts[-2] = f"{min(self.lengths):,} to {max(self.lengths):,} tokens"
        if self.query_length == 1:
            return ", ".join(["decode", *parts])
        if self.query_length == self.context:
            return ", ".join(["prefill", *parts])
        return ", ".join([f"{self.query_length} queries", *parts])

    def __str__(self) -> str:
        spec = self.spec
        if self.latent:
            rank, rope = spec.cache_rows.dims
            parts = ["mla", f"{spec.heads}", f"r{rank}+{rope}"]
            dim = spec.nope_dim
        else:
            square = self.query_length == self.context > 1
            parts = ["prefill" if square else "decode", f"{spec.heads}/{spec.kv_heads}"]
            dim = spec.head_dim
        same = dim == spec.value_dim
        parts += [f"d{dim}" if same else f"d{dim}/{spec.value_dim}", _short(self.context)]
        if self.query_length > 1 and parts[0] != "prefill":
            parts.append(f"s{self.query_length}")
        if self.batch > 1:
            parts.append(f"b{self.batch}")
        if self.ragged:
            parts.append("ragged")
        if self.vs_context is not None:
            parts.append(f"vs{_short(self.vs_context)}")
        if self.vs_threads is not None:
            parts.append(f"vs{self.vs_threads}t")
        return ":".join(parts)


@dataclass(frozen=True)
class Beside:
    """A shape that is timed beside another one: how it differs, itself, and its threads."""

    label: str
    shape: Shape
    threads: int


def parse_shape(text: str) -> Shape:
    """The shape that `text` describes.

    >>> print(parse_shape("mla:128:8k"))
    mla:128:r512+64:d128:8k
    >>> parse_shape("decode:32/8:16k")
    Traceback (most recent call last):
    headwise.errors.OptionError: shape 'decode:32/8:16k' has no dims (d128); expected kind:...

    Raises:
        OptionError: says which part is missing, unknown or given twice.
    """
    kind, *given = text.strip().lower().split(":")
    if kind not in KINDS:
        raise OptionError(f"shape {text!r} starts with {kind!r}; expected {SYNTAX}")
    found: dict[str, tuple[str | None, ...]] = {}
    for part in given:
        name, groups = _read(part, text, seen=found)
        if name in found:
            raise OptionError(f"shape {text!r} has two parts for {name}; expected {SYNTAX}")
        found[name] = groups
    latent = kind == "mla"
    for name, example in (("heads", "32/8"), ("dims", "d128"), ("context", "16k")):
        if name not in found and not (latent and name == "dims"):
            raise OptionError(f"shape {text!r} has no {name} ({example}); expected {SYNTAX}")
    if "latent" in found and not latent:
        raise OptionError(f"shape {text!r} has a latent rank; expected it for mla only")
    context = _tokens(found["context"])
    queries = context if kind == "prefill" else 1
    if "queries" in found:
        queries = _number(found["queries"][0])
    try:
        return Shape(
            spec=_spec(found, latent),
            context=context,
            query_length=queries,
            batch=_number(found.get("batch", ("1",))[0]),
            ragged="ragged" in found,
            vs_context=_tokens(found["vs_context"]) if "vs_context" in found else None,
            vs_threads=_number(found["vs_threads"][0]) if "vs_threads" in found else None,
        )
    except SpecError as error:
        raise OptionError(f"shape {text!r}: {error}") from error


def _read(part: str, text: str, *, seen: dict[str, tuple[str | None, ...]]) -> tuple[str, tuple]:
    """The name and the numbers of one part; of two bare numbers the first is the heads."""
    names = [name for name, pattern in _PATTERNS.items() if re.fullmatch(pattern, part)]
    if not names:
        raise OptionError(f"shape {text!r} has the unknown part {part!r}; expected {SYNTAX}")
    name = names[-1] if "heads" in seen else names[0]
    match = re.fullmatch(_PATTERNS[name], part)
    assert match is not None
    return name, match.groups()


def _spec(found: dict[str, tuple[str | None, ...]], latent: bool) -> AttentionSpec:
    heads, kv_heads = found["heads"]
    dim, value_dim = found.get("dims", ("128", None))
    query_heads = _number(heads)
    if not latent:
        return AttentionSpec(
            heads=query_heads,
            kv_heads=_number(kv_heads or heads),
            head_dim=_number(dim),
            value_dim=_number(value_dim or dim),
        )
    rank, rope = (_number(size) for size in found.get("latent", ("512", "64")))
    return AttentionSpec(
        heads=query_heads,
        kv_heads=_number(kv_heads or heads),
        head_dim=_number(dim) + rope,
        value_dim=_number(value_dim or dim),
        latent_rank=rank,
        rope_dim=rope,
    )


def _number(digits: str | None) -> int:
    assert digits is not None
    return int(digits)


def _tokens(groups: tuple[str | None, ...]) -> int:
    thousands, plain = groups
    return _number(plain) if thousands is None else 1024 * _number(thousands)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)

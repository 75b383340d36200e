"""What one benchmark of an operator computes: a layer's attention, a batch, queries and a context.

Written `decode:32/8:d128:16k`: a kind and its parts, joined by colons, the parts in any order.
PARTS lists them.
"""

import itertools
import re
from dataclasses import dataclass, replace

from headwise.base.console import counted
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

# The name and the numbers of each part; the names of sizes are those of `Shape`.
_PATTERNS = {
    "heads": r"(\d+)(?:/(\d+))?",
    "dims": r"d(\d+)(?:/(\d+))?",
    "latent": r"r(\d+)\+(\d+)",
    "context": r"(\d+k?)",
    "batch": r"b(\d+)",
    "query_length": r"s(\d+)",
    "ragged": r"ragged",
    "vs_context": r"vs(\d+k?)",
    "vs_threads": r"vs(\d+)t",
}
_SIZES = ("context", "batch", "query_length", "vs_context", "vs_threads")
Parts = dict[str, tuple[str | None, ...]]


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
            size = getattr(self, name)
            if size is not None and size < 1:
                raise OptionError(f"shape {self}: {name} is {size}, expected at least 1")
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
        return self.operator == "latent_attention"

    @property
    def operator(self) -> str:
        """The operator of `headwise.ops` that computes it."""
        return "latent_attention" if self.spec.mechanism == "MLA" else "attention"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each sequence holds, batch * context in all.

        >>> parse_shape("decode:4:d8:16:b4:ragged").lengths
        (4, 12, 20, 28)
        """
        if not self.ragged:
            return (self.context,) * self.batch
        ends = [self.context * index**2 // self.batch for index in range(self.batch + 1)]
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
        spec, queries = self.spec.decoded(), self.query_length
        folding = self.batch * queries * self._projections
        return sum(spec.flops(queries, length) for length in self.lengths) + 2 * folding

    def bytes(self, itemsize: int, bits: Bits | None = None) -> int:
        """Bytes that the call must move at least: cache, query and output once; MLA's weights.

        With `bits` the cache is of such integers and their scales.
        """
        spec, rows = self.spec, self.spec.cache_rows
        token = itemsize * rows.elements
        if bits is not None:
            token = rows.heads * sum(row_bytes(dim, bits) for dim in rows.dims)
        queries = self.batch * self.query_length * spec.heads * (spec.head_dim + spec.value_dim)
        return self.tokens * token + itemsize * (queries + self._projections)

    @property
    def _projections(self) -> int:
        """Elements of the weights that absorbed MLA folds in; none for other attention."""
        spec = self.spec
        if not self.latent:
            return 0
        return spec.heads * spec.cache_rows.dims[0] * (spec.nope_dim + spec.value_dim)

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
            return Beside(counted(self.vs_threads, "thread"), plain, self.vs_threads)
        return None

    def describe(self) -> str:
        """In words: `decode, GQA 32/8 heads, D 128, 16,384 tokens, batch 8`."""
        tokens = f"{self.context:,} tokens"
        if self.ragged:
            tokens = f"{min(self.lengths):,} to {max(self.lengths):,} tokens"
        dims = f"N {self.spec.nope_dim}, V {self.spec.value_dim}" if self.latent else ""
        batch = f"batch {self.batch}" if self.batch > 1 else ""
        stage = f"{self.query_length} queries"
        if self.query_length in (1, self.context):
            stage = "decode" if self.query_length == 1 else "prefill"
        return ", ".join(filter(None, (stage, str(self.spec), dims, tokens, batch)))

    def __str__(self) -> str:
        spec, queries = self.spec, self.query_length
        square = queries == self.context > 1 and not self.latent
        kind, heads, dim = "decode", f"{spec.heads}/{spec.kv_heads}", spec.head_dim
        if self.latent:
            rank, rope = spec.cache_rows.dims
            kind, heads, dim = "mla", f"{spec.heads}:r{rank}+{rope}", spec.nope_dim
        parts = (
            "prefill" if square else kind,
            heads,
            f"d{dim}" if dim == spec.value_dim else f"d{dim}/{spec.value_dim}",
            _short(self.context),
            f"s{queries}" if queries > 1 and not square else "",
            f"b{self.batch}" if self.batch > 1 else "",
            "ragged" if self.ragged else "",
            "" if self.vs_context is None else f"vs{_short(self.vs_context)}",
            "" if self.vs_threads is None else f"vs{self.vs_threads}t",
        )
        return ":".join(filter(None, parts))


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
    kind, *words = text.strip().lower().split(":")
    if kind not in KINDS:
        raise OptionError(f"shape {text!r} starts with {kind!r}; expected {SYNTAX}")
    parts: Parts = {}
    for word in words:
        name, numbers = _read(word, text, heads_known="heads" in parts)
        if name in parts:
            raise OptionError(f"shape {text!r} has two parts for {name}; expected {SYNTAX}")
        parts[name] = numbers
    if kind == "mla":
        parts = {"dims": ("128", None), "latent": ("512", "64")} | parts
    elif "latent" in parts:
        raise OptionError(f"shape {text!r} has a latent rank; expected it for mla only")
    for name, example in (("heads", "32/8"), ("dims", "d128"), ("context", "16k")):
        if name not in parts:
            raise OptionError(f"shape {text!r} has no {name} ({example}); expected {SYNTAX}")
    sizes = {name: _tokens(numbers[0]) for name, numbers in parts.items() if name in _SIZES}
    if kind == "prefill":
        sizes.setdefault("query_length", sizes["context"])
    try:
        return Shape(spec=_spec(parts), ragged="ragged" in parts, **sizes)
    except SpecError as error:
        raise OptionError(f"shape {text!r}: {error}") from error


def _read(word: str, text: str, *, heads_known: bool) -> tuple[str, tuple[str | None, ...]]:
    """The name and the numbers of one part; of two bare numbers the first is the heads."""
    names = [name for name, pattern in _PATTERNS.items() if re.fullmatch(pattern, word)]
    if not names:
        raise OptionError(f"shape {text!r} has the unknown part {word!r}; expected {SYNTAX}")
    name = names[-1] if heads_known else names[0]
    match = re.fullmatch(_PATTERNS[name], word)
    assert match is not None
    return name, match.groups()


def _spec(parts: Parts) -> AttentionSpec:
    heads, kv_heads = parts["heads"]
    dim, value_dim = parts["dims"]
    rank, rope = parts.get("latent", (None, None))
    return AttentionSpec(
        heads=_tokens(heads),
        kv_heads=_tokens(kv_heads or heads),
        head_dim=_tokens(dim) + _tokens(rope or "0"),
        value_dim=_tokens(value_dim or dim),
        latent_rank=_tokens(rank) if rank else None,
        rope_dim=_tokens(rope) if rope else None,
    )


def _tokens(digits: str | None) -> int:
    """A number; k after it is 1024."""
    assert digits is not None
    return 1024 * int(digits[:-1]) if digits.endswith("k") else int(digits)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)

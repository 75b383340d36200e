"""`Attention`: multi-head, multi-query and grouped-query attention as one module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from headwise.caches import Cache, ContiguousCache, SketchedCache
from headwise.errors import OptionError, ShapeError, UnsupportedError
from headwise.nn import checks
from headwise.nn.layer import AttentionLayer, append, split_heads
from headwise.nn.memory import Memory
from headwise.nn.norm import RMSNorm
from headwise.nn.pretrained import PretrainedLayer
from headwise.nn.rope import Rope
from headwise.ops import (
    Budget,
    add_rest,
    attention,
    choose_keys,
    means_of,
    means_under,
    sketch_of,
)
from headwise.spec import AttentionSpec


class Attention(AttentionLayer):
    """Projections, rotary embedding and attention of one layer, as its spec says.

    Example:
        >>> import torch
        >>> from headwise import AttentionSpec
        >>> from headwise.caches import ContiguousCache
        >>> from headwise.nn import Attention, Rope
        >>> spec = AttentionSpec(heads=8, kv_heads=2, head_dim=16, value_dim=16)
        >>> layer = Attention(spec, rope=Rope(16))
        >>> hidden = torch.randn(1, 10, 128)  # [B, S, E]
        >>> out = layer(hidden)
        >>> cache = ContiguousCache()
        >>> with torch.no_grad():
        ...     parts = [layer(part, cache=cache) for part in hidden.split([7, 3], dim=1)]
        >>> torch.allclose(torch.cat(parts, dim=1), out, atol=1e-5), cache.nbytes
        (True, 2560)

    With `spec.sparse` every query of a call without gradients chooses its keys, by a sketch that a
    `SketchedCache` keeps. In training PyTorch's kernels run (they have gradients), else the fastest
    that serve the call.

    Args:
        spec: what the layer computes; any but MLA.
        hidden_size: E, heads * head_dim by default.
        rope: rotary embedding of queries and keys; layers may share one.
        qkv_bias, out_bias: whether the projections have biases.
        source_size: width of what a `cross` layer attends to, E by default.
        norm_eps: of the norms of queries and keys, where the spec has qk_norm.
        memory: a new `Memory`, which keeps keys and values of past segments for later ones.
        device, dtype: of the weights.

    Raises:
        UnsupportedError: the spec is of MLA (see `LatentAttention`), has ALiBi without causality,
            or a relative bias, which a model computes once for all layers: leave it out and give
            `bias` to `forward`.
        OptionError: an argument of the wrong kind, or a `source_size` without cross-attention.
        SpecError: a size below 1.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        hidden_size: int | None = None,
        *,
        rope: Rope | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        source_size: int | None = None,
        norm_eps: float = 1e-6,
        memory: Memory | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_spec(spec)
        if spec.mechanism == "MLA":
            raise UnsupportedError(f"{spec} has a latent: build it with LatentAttention")
        if spec.relative_bias:
            raise UnsupportedError(
                f"{spec}: a relative bias is computed once for all layers; leave it out of the "
                "spec and give bias= to forward"
            )
        if spec.chunked:
            raise UnsupportedError(
                f"{spec}: chunks are a mask; leave window and chunked out, and give mask= to "
                "forward"
            )
        if spec.alibi and not spec.causal:
            raise UnsupportedError(f"{spec}: ALiBi is defined for causal attention; give bias=")
        if source_size is not None and not spec.cross:
            raise OptionError(f"source_size is {source_size}, and a layer of {spec} has no source")
        checks.check_rope(rope, spec.head_dim, whole=False)
        super().__init__(spec, hidden_size, spec.head_dim, rope)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        size = self.hidden_size
        self.source_size = source = checks.size_or("source_size", source_size, size)
        self.q_proj = nn.Linear(size, spec.heads * spec.head_dim, qkv_bias, **where)
        self.k_proj = nn.Linear(source, spec.kv_heads * spec.head_dim, qkv_bias, **where)
        self.v_proj = nn.Linear(source, spec.kv_heads * spec.value_dim, qkv_bias, **where)
        self.o_proj = nn.Linear(spec.heads * spec.value_dim, size, out_bias, **where)
        norm = spec.qk_norm
        self.q_norm = RMSNorm(spec.head_dim, eps=norm_eps, **where) if norm else None
        self.k_norm = RMSNorm(spec.head_dim, eps=norm_eps, **where) if norm else None
        self.sinks = nn.Parameter(torch.zeros(spec.heads, **where)) if spec.sinks else None
        if memory is not None:
            if not isinstance(memory, Memory):
                raise OptionError(f"memory is a {type(memory).__name__}, expected a Memory")
            memory.serve(spec, **where)
        self.memory = memory

    def forward(
        self,
        hidden: Tensor,
        source: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: [B, S, E].
            source: [B, L, E'], what a `cross` layer attends to; not needed, and not read, where the
                cache holds it already.
            positions: [S] or [B, S], of the hidden states; by default they follow what the cache
                holds.
            cache: the keys and values before these, to which these are added; without gradients.
                In a layer with a window it may be a `WindowCache` of that window.
            mask: boolean, True = attend; broadcasts to [B, H, S, L].
            bias: added to the scores; broadcasts to [B, H, S, L].

        Returns:
            [B, S, E].

        Raises:
            ShapeError: a cross layer without, or another one with a `source`; shapes that do not
                fit. The cache is as it was.
            UnsupportedError: a cache while gradients are needed; with a memory, what it refuses.
        """
        spec, memory = self.spec, self.memory
        checks.check_hidden("hidden", hidden, self.hidden_size)
        checks.check_cache(cache, spec.window, cross=spec.cross)
        filled = spec.cross and cache is not None and cache.length > 0
        if spec.cross and source is None and not filled:
            raise ShapeError(f"this is a layer of {spec}: expected source=, what it attends to")
        if source is not None:
            if not spec.cross:
                raise ShapeError(f"this is a layer of {spec}: expected no source")
            checks.check_hidden("source", source, self.source_size)
        if filled and torch.is_grad_enabled() and self.k_proj.weight.requires_grad:
            raise UnsupportedError(
                "the cache holds keys and values without gradients: use torch.no_grad(), or no "
                "cache"
            )
        source = hidden if source is None else source
        cached = 0 if cache is None else cache.held
        context = cached if filled else cached + source.shape[1]
        positions = self.start(
            hidden,
            None if spec.cross else cache,
            context,
            positions=positions,
            mask=mask,
            bias=bias,
        )
        query = split_heads(self.q_proj(hidden), spec.heads)
        if self.q_norm is not None:
            query = self.q_norm(query)
        plain_query = query
        if self.rope is not None:
            query = self.rope(query, positions)
        if not filled:
            plain_key, new_value = self._keys(source)
            new_key, dtype = self._rotated(plain_key, positions), new_value.dtype
            # norms and rotations stay in float32 under autocast
            plain_key, new_key = plain_key.to(dtype), new_key.to(dtype)
            if memory is not None:
                seen = _seen(mask, bias, cache, hidden)
                memory.check(plain_key, new_value, cached=cache is not None)
            key, value, kv = append(cache, new_key, new_value)
        else:
            assert isinstance(cache, ContiguousCache)
            assert cache.second is not None
            key, value, kv, dtype = cache.first, cache.second, None, cache.second.dtype
        if spec.window is not None and not spec.causal:
            near = _near(query.shape[2], context, spec.window, hidden.device)
            mask = near if mask is None else mask & near
        query, indices, rest = query.to(dtype), None, None
        reads = memory is not None and memory.reads(query.shape[2])
        also: dict[str, Any] = {}
        if reads and memory is not None and memory.gate is None:
            also["return_lse"] = True  # not where nothing reads it: it takes SDPA away
        one_mask = mask is None or mask.ndim < 4 or mask.shape[1] == 1
        plain = one_mask and bias is None and (kv is None or kv.lengths is None)
        if spec.sparse is not None and not torch.is_grad_enabled() and plain:
            rows = key if kv is None else kv.dense(dtype)[0]
            if rows is not None and context > spec.sparse.least:
                indices, rest = self._chosen(query, rows, cache, mask)
                values = value if kv is None else kv.dense(dtype)[1]
        attended: Any = attention(
            query,
            key,
            value,
            kv=kv,
            causal=spec.causal,
            scale=spec.scale,
            window=spec.window if spec.causal else None,
            sinks=self.sinks,
            softcap=spec.softcap,
            alibi_slopes=alibi_slopes(spec.heads, hidden.device) if spec.alibi else None,
            bias=bias,
            mask=mask,
            indices=indices,
            **also,
        )
        out, lse = attended if isinstance(attended, tuple) else (attended, None)
        if memory is not None and hidden.shape[1] > 0:
            found = memory.attend(
                plain_query.to(dtype),
                plain_key,
                new_value,
                seen,
                scale=spec.scale,
                softcap=spec.softcap,
                cached=cache is not None,
            )
            out = memory.join(out, lse, *found) if reads else out
        if rest is not None:
            out = add_rest(out, rest, _means(values, query.shape[2], cache, mask))
        return self.finish(out)

    def _chosen(
        self, query: Tensor, key: Tensor, cache: Cache | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The keys that each query gets, int32 [B, K, S, most], and the rest [B, H, S]."""
        assert self.spec.sparse is not None
        return choose_keys(
            query,
            cache.sketch if isinstance(cache, SketchedCache) else sketch_of(key),
            Budget.of(self.spec.sparse),
            scale=self.spec.scale,
            softcap=self.spec.softcap,
            sinks=self.sinks,
            mask=mask,
        )

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, K, L, D], not rotated, and values [B, K, L, V]."""
        key = split_heads(self.k_proj(source), self.spec.kv_heads)
        value = split_heads(self.v_proj(source), self.spec.kv_heads)
        if self.k_norm is not None:
            key = self.k_norm(key)
        return key, value

    def _rotated(self, key: Tensor, positions: Tensor) -> Tensor:
        if self.rope is None:
            return key
        if self.spec.cross:
            positions = torch.arange(key.shape[2], device=key.device)
        rotated: Tensor = self.rope(key, positions)
        return rotated

    @classmethod
    def from_pretrained_layer(cls, module: Any) -> "Attention":
        """A copy of the attention module of a Transformers model, weights and all.

        Serves the modules of Llama, Mistral and Mixtral, Qwen 2 and 3, Gemma 2 and 3, and gpt-oss.
        Dropout of the attention is not taken over.

        Example:
            >>> import transformers
            >>> config = transformers.LlamaConfig(
            ...     vocab_size=99,
            ...     hidden_size=64,
            ...     intermediate_size=96,
            ...     num_hidden_layers=1,
            ...     num_attention_heads=4,
            ...     num_key_value_heads=2,
            ... )
            >>> model = transformers.LlamaForCausalLM(config)
            >>> print(Attention.from_pretrained_layer(model.model.layers[0].self_attn).spec)
            GQA 4/2 heads, D 16

        Raises:
            UnsupportedError: another kind of module.
            SpecError: its config contradicts itself.
        """
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        stock = PretrainedLayer.read(module, names)
        layer = cls(
            **stock.arguments("q_norm"),
            qkv_bias=stock.has_bias("q_proj"),
            out_bias=stock.has_bias("o_proj"),
        )
        stock.fill(layer, {name: name for name in (*names, "q_norm", "k_norm")})
        if layer.sinks is not None:
            layer.sinks.data.copy_(module.sinks.detach())
        return layer


def _means(value: Any, queries: int, cache: Cache | None, mask: Tensor | None) -> Tensor:
    """The means of the values [B, K, L, V] that each query sees, [B, K, S, V]."""
    if mask is not None:
        causal = torch.ones(queries, value.shape[2], dtype=torch.bool, device=value.device)
        seen = mask & causal.tril(value.shape[2] - queries)
        return means_under(seen[(None,) * (4 - seen.ndim)], value)
    return cache.means(queries) if isinstance(cache, SketchedCache) else means_of(value, queries)


def _seen(mask: Tensor | None, bias: Tensor | None, cache: Cache | None, hidden: Tensor) -> Tensor:
    """[B, S]: whether some query of the call may attend to the token.

    Raises:
        UnsupportedError: the tokens' columns differ from sequence to sequence.
    """
    batch, length = hidden.shape[:2]
    seen = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    shown = [
        each for each in (mask, None if bias is None else ~bias.isneginf()) if each is not None
    ]
    if shown and cache is not None and cache.starts is not None:
        raise UnsupportedError(
            "a mask or a bias over a cache of sequences of different lengths: a memory cannot tell "
            "which of the new tokens it hides"
        )
    for each in shown:
        own = each[(None,) * (4 - each.ndim)].any(dim=2).any(dim=1)
        seen = seen & own[:, -length:]
    return seen


def _near(length: int, context: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, S, L]: where query and key are less than `window` apart, the last on the last."""
    query = torch.arange(context - length, context, device=device)
    apart = query[:, None] - torch.arange(context, device=device)
    return (apart.abs() < window)[None, None]


def alibi_slopes(heads: int, device: Any = None) -> Tensor:
    """ALiBi's slope of each head, [H], positive: 2^(-8i / H) for a power of two.

    For other numbers those of the next lower power, then every other one of the next higher.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    Source: Press et al. 2021, arXiv 2108.12409, and its published code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (heads - power) + 1, 2)]
    return torch.tensor(slopes, device=device)

"""A small decoder around the specs of its layers, to compare mechanisms with and to learn from."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headwise.caches import ContiguousCache, SketchedCache, StateCache, WindowCache
from headwise.errors import OptionError, ShapeError, UnsupportedError
from headwise.nn.attention import Attention
from headwise.nn.checks import check_state_spec, size_or
from headwise.nn.latent_attention import LatentAttention
from headwise.nn.linear_attention import LinearAttention
from headwise.nn.memory import Memory
from headwise.nn.norm import RMSNorm
from headwise.nn.rope import Rope
from headwise.ops import require_tensor
from headwise.spec import AttentionSpec, ModelSpec, StateSpec
from headwise.spec.checks import positive_int

# What a decoder has in its layers, and what these keep.
Mixing: TypeAlias = AttentionSpec | StateSpec
LayerCache: TypeAlias = ContiguousCache | WindowCache | StateCache


class Decoder(nn.Module):
    """Embedding, blocks of attention and SwiGLU behind RMSNorms, logits by the embedding.

    Example:
        >>> import torch
        >>> from headwise import AttentionSpec
        >>> from headwise.nn import Decoder
        >>> spec = AttentionSpec(heads=4, kv_heads=2, head_dim=16, value_dim=16)
        >>> model = Decoder(spec, layers=2, vocabulary=99)
        >>> prompt = torch.randint(99, (1, 5))
        >>> model(prompt).shape, model.generate(prompt, max_new_tokens=3).shape
        (torch.Size([1, 5, 99]), torch.Size([1, 8]))

    Args:
        spec: the attention or linear attention of every layer, or a `ModelSpec` with that of each,
            in any pattern. Any decoder's, MLA too, without relative bias and without
            cross-attention.
        vocabulary: number of tokens.
        layers: number of blocks, for an `AttentionSpec` or a `StateSpec`.
        hidden_size: E, heads * value_dim of the first layer by default.
        feed_forward: inner width of the SwiGLU, 8/3 E rounded up to a multiple of 32 by default.
        theta: base of the rotary embedding, which layers with ALiBi and states do without;
            retention has one.
        memory: a new `Memory`; every layer of attention gets one like it. They keep what they have
            read until `clear_memory`.
        checkpointing: compute each block again in the backward pass instead of keeping its
            activations.

    Raises:
        OptionError: `layers` is missing or given twice, `spec` no kind of spec.
        SpecError: a size below 1.
        UnsupportedError: a layer that this decoder cannot have; a memory with checkpointing, or
            without a layer that can have one.
    """

    def __init__(
        self,
        spec: Mixing | ModelSpec,
        *,
        vocabulary: int,
        layers: int | None = None,
        hidden_size: int | None = None,
        feed_forward: int | None = None,
        theta: float = 10_000.0,
        memory: Memory | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        specs = _mixers(spec, layers)
        if memory is not None:
            _check_memory(specs, checkpointing)
        self.specs, self.checkpointing = specs, checkpointing
        positive_int("vocabulary", vocabulary)
        size = size_or("hidden_size", hidden_size, specs[0].heads * specs[0].value_dim)
        inner = size_or("feed_forward", feed_forward, -(-8 * size // 3 // 32) * 32)
        ropes = {dim: Rope(dim, theta=theta) for dim in set(map(_rotated, specs)) if dim}
        self.embedding = nn.Embedding(vocabulary, size)
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        self.blocks = nn.ModuleList(
            _Block(each, size, inner, ropes.get(_rotated(each)), memory) for each in specs
        )
        self.norm = RMSNorm(size, eps=1e-6)

    def forward(
        self,
        tokens: Tensor,
        *,
        caches: Sequence[LayerCache] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, S] to logits [B, S, vocabulary].

        Args:
            tokens: [B, S] int.
            caches: of `new_caches`; these tokens are added to them. Without gradients.
            positions: [S] or [B, S]; by default they follow what the caches hold.
            mask: boolean, True = attend; broadcasts to [B, H, S, L].

        Raises:
            ShapeError: there are not as many caches as blocks, each its own and of its kind.
            UnsupportedError: a mask, and a layer that keeps a state, which no mask reaches.
        """
        states = [spec for spec in self.specs if isinstance(spec, StateSpec)]
        if mask is not None and states:
            raise UnsupportedError(f"mask is given, and {states[0]} has no keys to hide: leave it")
        if caches is not None and len(caches) != len(self.blocks):
            raise ShapeError(f"{len(caches)} caches, expected {len(self.blocks)}, one per block")
        if caches is not None:
            self._check_caches(caches)
        hidden = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            if self.checkpointing and torch.is_grad_enabled() and cache is None:
                hidden = checkpoint(block, hidden, positions, cache, mask, use_reentrant=False)
            else:
                hidden = block(hidden, positions, cache, mask)
        logits: Tensor = F.linear(self.norm(hidden), self.embedding.weight)
        return logits

    def _check_caches(self, caches: Sequence[LayerCache]) -> None:
        """Before any block changes its own, which a state could not take back."""
        if len(set(map(id, caches))) < len(caches):
            raise ShapeError("a cache is given twice: expected one of its own for each block")
        for index, (spec, cache) in enumerate(zip(self.specs, caches, strict=True)):
            if isinstance(spec, StateSpec) != isinstance(cache, StateCache):
                raise ShapeError(
                    f"the cache of block {index} is a {type(cache).__name__}, and the block has "
                    f"{spec}: give those of new_caches()"
                )

    def new_caches(self) -> list[LayerCache]:
        """An empty cache for each block: of keys and values (in a window), or of a state."""
        return list(map(_cache_for, self.specs))

    def clear_memory(self, sequences: int | Sequence[int] | None = None) -> None:
        """Let the memories of all blocks forget all, or a sequence of the batch, or some."""
        for block in self.blocks:
            memory = getattr(block.attention, "memory", None)
            if memory is not None:
                memory.clear(sequences)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """tokens [B, S] and what follows them, [B, S + max_new_tokens].

        Args:
            tokens: [B, S], at least one.
            max_new_tokens: how many to add.
            temperature: sample at it; None: the likeliest token each time.
            generator: of random numbers, for sampling.
            use_cache: False reads all tokens again for each one; the result is the same.

        Raises:
            OptionError: `max_new_tokens` is negative or `temperature` not above 0.
            ShapeError: there is no token to begin with.
            UnsupportedError: no cache, and a memory, which would read each token many times.
        """
        if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise OptionError(
                f"max_new_tokens is {max_new_tokens!r}, expected an int of at least 0"
            )
        if temperature is not None and not temperature > 0:
            raise OptionError(f"temperature is {temperature}, expected above 0, or None for greedy")
        require_tensor("tokens", tokens, 2)
        if tokens.shape[1] == 0:
            raise ShapeError(f"tokens have shape {list(tokens.shape)}, expected [B, S], S from 1")
        if not use_cache and any(isinstance(each, Memory) for each in self.modules()):
            raise UnsupportedError(
                "use_cache=False, and a memory, which would read each token many times: leave it"
            )
        caches = self.new_caches() if use_cache else None
        read = tokens
        for _ in range(max_new_tokens):
            logits = self(read, caches=caches)[:, -1]
            if temperature is None:
                token = logits.argmax(-1, keepdim=True)
            else:
                below = logits.double() - logits.double().amax(-1, keepdim=True)
                chances = (below / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)
            tokens = torch.cat((tokens, token), dim=1)
            read = token if use_cache else tokens
        return tokens


def _cache_for(spec: Mixing) -> LayerCache:
    if isinstance(spec, StateSpec):
        return StateCache()
    if spec.window is not None and not spec.chunked:
        return WindowCache(spec.window)
    return ContiguousCache() if spec.sparse is None else SketchedCache()


def _check_memory(specs: Sequence[Mixing], checkpointing: bool) -> None:
    able = [isinstance(spec, AttentionSpec) for spec in specs]
    latent = [spec for spec in specs if isinstance(spec, AttentionSpec) and spec.mechanism == "MLA"]
    if latent or not any(able):
        raise UnsupportedError(f"memory is given, and {(latent or specs)[0]} cannot have one")
    if checkpointing:
        raise UnsupportedError(
            "memory and checkpointing: a block that runs again in the backward pass finds another "
            "memory; leave one out"
        )


class _Block(nn.Module):
    """Attention and a SwiGLU (Shazeer 2020, arXiv 2002.05202), each added to what it reads."""

    def __init__(
        self, spec: Mixing, size: int, inner: int, rope: Rope | None, memory: Memory | None
    ) -> None:
        super().__init__()
        kind: Any = LinearAttention
        options: dict[str, Any] = {}
        if isinstance(spec, AttentionSpec):
            kind = LatentAttention if spec.mechanism == "MLA" else Attention
            options = {} if memory is None else {"memory": deepcopy(memory)}
        self.attention_norm = RMSNorm(size, eps=1e-6)
        self.attention = kind(spec, size, rope=rope, **options)
        self.feed_norm = RMSNorm(size, eps=1e-6)
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor | None,
        cache: LayerCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        options: dict[str, Any] = {} if mask is None else {"mask": mask}
        read = self.attention_norm(hidden)
        hidden = hidden + self.attention(read, positions=positions, cache=cache, **options)
        gate, up = self.gate_up(self.feed_norm(hidden)).chunk(2, dim=-1)
        fed: Tensor = self.down(F.silu(gate) * up)
        return hidden + fed


def _rotated(spec: Mixing) -> int:
    """Dims of a head that a rotary embedding turns."""
    if isinstance(spec, StateSpec):
        return spec.key_dim if spec.decay == "fixed" else 0
    return 0 if spec.alibi else spec.rotary_dim


def _mixers(spec: Mixing | ModelSpec, layers: int | None) -> list[Mixing]:
    """The attention or state of each block.

    Raises:
        OptionError: `layers` is missing or given twice, `spec` no kind of spec.
        UnsupportedError: a layer that a decoder cannot have, or none.
    """
    mixers: list[Mixing] = []
    if isinstance(spec, Mixing):
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise OptionError(
                f"layers is {layers!r}, expected at least 1 with a {type(spec).__name__}"
            )
        mixers = [spec] * layers
    elif not isinstance(spec, ModelSpec):
        raise OptionError(
            f"spec is a {type(spec).__name__}, expected an AttentionSpec, a StateSpec or a "
            "ModelSpec"
        )
    elif layers is not None:
        raise OptionError(f"layers is {layers}, and {spec.family}'s ModelSpec says it already")
    else:
        for layer in spec.layers:
            if not isinstance(layer.mixer, Mixing) or layer.cross_attention is not None:
                raise UnsupportedError(f"layer {layer.index} of {spec.family}: {layer}")
            mixers.append(layer.mixer)
    for mixer in mixers:
        if isinstance(mixer, StateSpec):
            check_state_spec(mixer)
        elif not mixer.causal or mixer.cross:
            raise UnsupportedError(f"{mixer}: a decoder attends to itself and to no later token")
    if not mixers:
        raise UnsupportedError(f"{spec} has no decoder layers")
    return mixers

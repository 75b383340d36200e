"""`LinearAttention`: retention, gated linear attention, Mamba-2 and the gated delta rules.

Retention: Sun et al. 2023, arXiv 2307.08621. Gated linear attention: Yang et al. 2023, 2312.06635.
Mamba-2: Dao and Gu 2024, 2405.21060. Gated DeltaNet: Yang et al. 2024, 2412.06464. Kimi Linear:
2510.26692.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwise.caches import StateCache
from headwise.errors import ShapeError, UnsupportedError
from headwise.nn import checks
from headwise.nn.layer import split_heads
from headwise.nn.pretrained_linear import read_linear
from headwise.nn.rope import Rope, check_positions
from headwise.ops import ConvolutionCall, LinearCall, change_state, convolve
from headwise.ops.attend.checks import require_lengths
from headwise.spec import StateSpec

# Added to the squared length of a query or key, where the delta rule norms them.
_QK_EPS = 1e-6
# What Mamba-2 starts from: rates of 1 to 16, and steps of 1/1000 to 1/10, none below 1/10000.
_RATES, _STEPS, _LEAST_STEP = (1.0, 16.0), (1e-3, 0.1), 1e-4
# The rate of gated linear attention, 1 / 16 of a sigmoid's logarithm.
_SLOW_RATE = 1 / 16


class LinearAttention(nn.Module):
    """Projections, a short convolution, the state of each head, its norm and its gate.

    By its spec it is one of these, with the decays, norm and gate of a family of models:

    - gated delta rule, as in Qwen3-Next: queries and keys have length 1, the decay's logarithm is
      -exp(A_log) softplus(x + dt_bias); norm, then a gate by silu.
    - Kimi delta attention: the same with a decay of each dim; norm, then a gate by sigmoid.
    - state-space duality, as in Mamba-2: C asks and B is the key; the softplus also scales the
      value; gate by silu, then a norm over the heads of a group.
    - gated linear attention: decays as Kimi's without the delta rule; norm and gate as in RetNet.
    - retention: head h decays by 1 - 2^(-5 - h), `rope` turns queries and keys; norm, then a gate
      by silu, as in RetNet.

    Example:
        >>> import torch
        >>> from headwise.caches import StateCache
        >>> from headwise.nn import LinearAttention
        >>> from headwise.spec import StateSpec
        >>> spec = StateSpec(
        ...     conv_channels=128, conv_width=4, heads=4, key_heads=2, key_dim=16, value_dim=16
        ... )
        >>> print(spec)
        gated delta rule 4/2 heads, state 16 x 16
        >>> layer = LinearAttention(spec)
        >>> hidden = torch.randn(1, 10, 64)  # [B, S, E]
        >>> out = layer(hidden)
        >>> cache = StateCache()
        >>> with torch.no_grad():
        ...     parts = [layer(part, cache=cache) for part in hidden.split([7, 3], dim=1)]
        >>> torch.allclose(torch.cat(parts, dim=1), out, atol=1e-5), cache.nbytes
        (True, 6144)

    In training PyTorch's products run (they have gradients), else the fastest that serve the call.

    Args:
        spec: what the layer computes. Its convolution, if there is one, is over query, key and
            value: 2 * key_heads * key_dim + heads * value_dim channels.
        hidden_size: E, heads * value_dim by default.
        rope: rotary embedding of queries and keys (RetNet has one); layers may share it.
        norm_eps: of the norm of what the states answer.
        device, dtype: of the weights.

    Raises:
        OptionError: an argument of the wrong kind, or a rope of more dims than a key has.
        UnsupportedError: the spec has no state, or a convolution of other channels.
        SpecError: a size below 1.
    """

    def __init__(
        self,
        spec: StateSpec,
        hidden_size: int | None = None,
        *,
        rope: Rope | None = None,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_state_spec(spec)
        checks.check_rope(rope, spec.key_dim, whole=False)
        super().__init__()
        self.spec, self.rope, self.norm_eps = spec, rope, norm_eps
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.inner = spec.heads * spec.value_dim
        self.hidden_size = size = checks.size_or("hidden_size", hidden_size, self.inner)
        keys = spec.query_heads * spec.key_dim
        self.parts = [keys, keys, self.inner]
        self.by_step = not spec.delta and spec.decay == "head"  # Mamba-2's
        self.qkv_proj = nn.Linear(size, sum(self.parts), bias=False, **where)
        self.conv_weight = self.conv_bias = self.skip = self.A_log = self.dt_bias = None
        self.decay_proj: nn.Module | None = None
        self.beta_proj: nn.Module | None = None
        if spec.conv_width:
            weight = torch.empty(spec.conv_channels, spec.conv_width, **where)
            nn.init.uniform_(weight, -(spec.conv_width**-0.5), spec.conv_width**-0.5)
            self.conv_weight = nn.Parameter(weight)
        if spec.conv_width and self.by_step:
            self.conv_bias = nn.Parameter(torch.zeros(spec.conv_channels, **where))
        if self.by_step:
            self.skip = nn.Parameter(torch.ones(spec.heads, **where))
        if spec.decay == "head":
            self.decay_proj = nn.Linear(size, spec.heads, bias=False, **where)
        elif spec.decay == "dim":
            self.decay_proj = _through(spec.key_dim, size, spec.heads * spec.key_dim, where)
        if spec.decay != "fixed":
            each = spec.key_dim if spec.decay == "dim" else 1
            self.A_log = nn.Parameter(torch.empty(spec.heads, **where))
            self.dt_bias = nn.Parameter(torch.empty(spec.heads * each, **where))
        if spec.delta:
            self.beta_proj = nn.Linear(size, spec.heads, bias=False, **where)
        if self._is_kimi:
            self.gate_proj: nn.Module = _through(spec.value_dim, size, self.inner, where)
        else:
            self.gate_proj = nn.Linear(size, self.inner, bias=False, **where)
        normed = self.inner if self.by_step else spec.value_dim
        self.norm_weight = nn.Parameter(torch.ones(normed, **where))
        self.o_proj = nn.Linear(self.inner, size, bias=False, **where)
        self._start_decays()

    @property
    def _is_kimi(self) -> bool:
        return self.spec.delta and self.spec.decay == "dim"

    @torch.no_grad()
    def _start_decays(self) -> None:
        if self.A_log is None or self.dt_bias is None:
            return
        if not self.spec.delta and not self.by_step:
            self.A_log.fill_(math.log(_SLOW_RATE))
            self.dt_bias.zero_()
            return
        self.A_log.uniform_(*_RATES).log_()
        low, high = map(math.log, _STEPS)
        step = self.dt_bias.uniform_(low, high).exp_().clamp_(min=_LEAST_STEP)
        step.copy_(step + torch.log(-torch.expm1(-step)))  # whose softplus is the step

    def forward(
        self,
        hidden: Tensor,
        *,
        cache: StateCache | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Change the state by each token, and answer the token from it.

        Args:
            hidden: [B, S, E].
            cache: what the tokens before have left, which is changed; without gradients.
            lengths: [B] int, the tokens of each sequence; at or past its length a token changes
                nothing, and gives 0.
            positions: [S] or [B, S], for the rotary embedding; by default they follow what the
                cache has read. Nothing else depends on them.

        Returns:
            [B, S, E].

        Raises:
            ShapeError: shapes that do not fit, or a cache of another layer. The cache is as it was.
            UnsupportedError: a cache while gradients are needed.
        """
        checks.check_hidden("hidden", hidden, self.hidden_size)
        batch, length = hidden.shape[:2]
        if lengths is not None:
            require_lengths(lengths, batch, length, hidden.device, "lengths")
        if positions is not None:
            check_positions(positions, batch, length)
        mixed = self.qkv_proj(hidden)
        self._check_cache(cache, hidden, mixed)
        mixed, inputs = self._convolve(mixed, cache, lengths)
        heads = (self.spec.query_heads, self.spec.query_heads, self.spec.heads)
        query, key, value = map(split_heads, mixed.split(self.parts, dim=-1), heads)
        if self.rope is not None:
            positions = _positions(hidden, cache) if positions is None else positions
            query, key = self.rope(query, positions), self.rope(key, positions)
        out, state = self._change(hidden, query, key, value, cache, lengths)
        if cache is not None:
            cache.count(length, lengths)
            cache.hold(inputs, state)
        gated = self._gated(out, self.gate_proj(hidden)).to(mixed.dtype)
        if lengths is not None:  # whatever the gate of padding is
            past = torch.arange(length, device=hidden.device) >= lengths[:, None]
            gated = gated.masked_fill(past.unsqueeze(-1), 0.0)
        projected: Tensor = self.o_proj(gated)
        return projected

    def _convolve(
        self, mixed: Tensor, cache: StateCache | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values [B,S,C] after the convolution, and its last inputs [B,C,W]."""
        if self.conv_weight is None:
            return mixed, None
        bias, before = self.conv_bias, None if cache is None else cache.inputs
        out, inputs = convolve(
            ConvolutionCall(
                mixed.transpose(1, 2),
                self.conv_weight.to(mixed.dtype),
                None if bias is None else bias.to(mixed.dtype),
                "silu",
                before,
                lengths,
                self.spec.conv_width,
                in_place=before is not None,
            )
        )
        return out.transpose(1, 2), inputs

    def _change(
        self,
        hidden: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: StateCache | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What the states answer [B,H,S,V], and the last ones [B,H,D,V]."""
        exact, beta, given = torch.promote_types(value.dtype, torch.float32), None, value
        decay, step = self._decay(hidden, exact)
        if self.beta_proj is not None:
            beta = self.beta_proj(hidden).to(exact).sigmoid().transpose(1, 2)
        if self.by_step:
            assert step is not None
            query, key, given = query.to(exact), key.to(exact), value.to(exact)
            value = given * step.unsqueeze(-1)
        before = None if cache is None else cache.state
        out, state = change_state(
            LinearCall(
                query,
                key,
                value,
                decay,
                beta,
                1.0 if self.by_step else self.spec.key_dim**-0.5,
                before,
                lengths,
                norm=_QK_EPS if self.spec.delta else None,
                in_place=before is not None,
            )
        )
        if self.skip is not None:
            out = out + self.skip.to(exact).view(-1, 1, 1) * given
        return out, state

    def _decay(self, hidden: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Logarithms [H], [B,H,S] or [B,H,S,D] of the decays, and Mamba-2's steps [B,H,S]."""
        if self.decay_proj is None or self.A_log is None or self.dt_bias is None:
            head = torch.arange(self.spec.heads, device=hidden.device, dtype=exact)
            return torch.log1p(-torch.exp2(-5 - head)), None
        step = F.softplus(self.decay_proj(hidden).to(exact) + self.dt_bias.to(exact))
        rate = -self.A_log.to(exact).exp().view(-1, 1)
        if self.spec.decay == "dim":
            step = split_heads(step, self.spec.heads)
            return rate.unsqueeze(-1) * step, None
        step = step.transpose(1, 2)
        return rate * step, step

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """What the states answer [B,H,S,V], normed and gated, [B,S,H*V]."""
        exact = torch.promote_types(out.dtype, torch.float32)
        rows, gate = out.transpose(1, 2).to(exact), gate.to(exact)
        gate = gate.sigmoid() if self._is_kimi else F.silu(gate)
        weight = self.norm_weight.to(exact)
        if self.by_step:  # over the heads of a group together
            rows = (rows.flatten(2) * gate).unflatten(-1, (self.spec.query_heads, -1))
            rows = F.rms_norm(rows, rows.shape[-1:], eps=self.norm_eps)
            return rows.flatten(2) * weight
        return F.rms_norm(rows, rows.shape[-1:], weight, self.norm_eps).flatten(2) * gate

    def _check_cache(self, cache: Any, hidden: Tensor, mixed: Tensor) -> None:
        """Raise unless the layer can go on from `cache`."""
        if cache is None:
            return
        if not isinstance(cache, StateCache):
            raise ShapeError(
                f"cache is a {type(cache).__name__}, expected a headwise.caches.StateCache, a new "
                "one for each layer"
            )
        trained = [hidden, *self.parameters()]
        if torch.is_grad_enabled() and any(each.requires_grad for each in trained):
            raise UnsupportedError(
                "the layer needs gradients, and a cache is changed in place: use torch.no_grad(), "
                "or train without a cache"
            )
        spec, batch = self.spec, hidden.shape[0]
        if cache.batch is not None:
            for name, held, has in (
                ("inputs of a convolution", cache.inputs, spec.conv_width > 0),
                ("a state", cache.state, True),
            ):
                if (held is not None) != has:
                    raise ShapeError(
                        f"the cache holds {'no ' if has else ''}{name.removeprefix('a ')}, and "
                        f"{spec} has {name if has else 'none'}: give the cache of this layer"
                    )
        exact = torch.promote_types(mixed.dtype, torch.float32)
        inputs = [batch, spec.conv_channels, spec.conv_width]
        state = [batch, spec.heads, spec.key_dim, spec.value_dim]
        for name, held, shape, dtype in (
            ("inputs", cache.inputs, inputs, mixed.dtype),
            ("a state", cache.state, state, exact),
        ):
            wanted = (shape, dtype, mixed.device)
            if held is not None and (list(held.shape), held.dtype, held.device) != wanted:
                raise ShapeError(
                    f"the cache holds {name} {list(held.shape)} in {held.dtype} on {held.device}, "
                    f"expected {shape} in {dtype} on {mixed.device}: give the cache of this layer "
                    "and of these sequences, in the same dtype"
                )

    @classmethod
    def from_pretrained_layer(cls, module: Any) -> "LinearAttention":
        """A copy of a linear attention module of a Transformers model, weights and all.

        Serves those of Qwen3-Next, Kimi Linear and Mamba-2.

        Example:
            >>> import transformers
            >>> config = transformers.Mamba2Config(
            ...     vocab_size=99,
            ...     hidden_size=32,
            ...     num_heads=8,
            ...     head_dim=8,
            ...     state_size=16,
            ...     n_groups=2,
            ...     num_hidden_layers=1,
            ... )
            >>> model = transformers.Mamba2ForCausalLM(config)
            >>> print(LinearAttention.from_pretrained_layer(model.backbone.layers[0].mixer).spec)
            state-space duality 8/2 heads, state 16 x 8

        Raises:
            UnsupportedError: another kind of module, or one that does more.
        """
        stock = read_linear(module)
        layer = cls(stock.spec, stock.hidden_size, norm_eps=stock.norm_eps, device="meta")
        parameters = dict(layer.named_parameters())
        assert parameters.keys() == stock.weights.keys()
        for name, weight in stock.weights.items():
            assert weight.shape == parameters[name].shape, name
        layer.load_state_dict(
            {name: weight.detach().clone() for name, weight in stock.weights.items()}, assign=True
        )
        return layer.train(module.training)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return str(self.spec)


def _through(rank: int, size: int, out: int, where: dict[str, Any]) -> nn.Sequential:
    """A projection of low rank."""
    first = nn.Linear(size, rank, bias=False, **where)
    return nn.Sequential(first, nn.Linear(rank, out, bias=False, **where))


def _positions(hidden: Tensor, cache: StateCache | None) -> Tensor:
    """Those after what the cache has read, [S] or where sequences differ [B,S]."""
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    if cache is None:
        return steps
    if cache.starts is not None:
        return torch.tensor(cache.starts, device=hidden.device)[:, None] + steps
    return steps + cache.length

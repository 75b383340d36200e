"""`LatentAttention`: multi-head latent attention (MLA) as a module.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Its W_DKV and W_KR are `kv_down`, one projection; W_UK
and W_UV are `w_uk` and `w_uv`; W_DQ and W_UQ with W_QR are `q_down` and `q_up`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from headwise.caches import Cache
from headwise.errors import UnsupportedError
from headwise.nn import checks
from headwise.nn.layer import AttentionLayer, append, split_heads
from headwise.nn.norm import RMSNorm
from headwise.nn.pretrained import PretrainedLayer
from headwise.nn.rope import Rope
from headwise.ops import KV, Paradigm, latent_attention
from headwise.spec import AttentionSpec

# Options of a spec that MLA does not have here.
_NOT_SERVED = ("window", "softcap", "sinks", "alibi", "relative_bias", "qk_norm", "cross")
# The modules of Transformers' layer, by the names that they have here.
_NAMES = {
    "q_proj": "q_proj",
    "q_a_proj": "q_down",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "q_up",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "o_proj": "o_proj",
}


class LatentAttention(AttentionLayer):
    """Compression to a latent and a rotary key, which are cached, and attention over them.

    Example:
        >>> import torch
        >>> from headwise import AttentionSpec
        >>> from headwise.nn import LatentAttention, Rope
        >>> spec = AttentionSpec(
        ...     heads=4, kv_heads=4, head_dim=24, value_dim=16, latent_rank=32, rope_dim=8
        ... )
        >>> layer = LatentAttention(spec, hidden_size=64, rope=Rope(8))
        >>> hidden = torch.randn(1, 10, 64)  # [B, S, E]
        >>> expanded, absorbed = (layer(hidden, paradigm=p) for p in ("expanded", "absorbed"))
        >>> torch.allclose(expanded, absorbed, atol=1e-5)
        True

    Args:
        spec: an MLA layer; with a `query_rank` the queries are compressed as well.
        hidden_size: E, heads * value_dim by default.
        rope: rotary embedding of the P dims beside the latent; None: without position.
        norm_eps: of the norms of the latents.
        device, dtype: of the weights.

    Raises:
        UnsupportedError: the spec is not of MLA, or has an option that MLA is not served with.
        OptionError: an argument of the wrong kind, or a rope of other than the spec's `rope_dim`.
        SpecError: a size below 1.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        hidden_size: int | None = None,
        *,
        rope: Rope | None = None,
        norm_eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.check_spec(spec)
        if spec.latent_rank is None or spec.rope_dim is None:
            raise UnsupportedError(f"{spec} has no latent: build it with Attention")
        if spec.nope_dim == 0:
            raise UnsupportedError(
                f"{spec} rotates all {spec.head_dim} dims of a key, so that its scores do not "
                "depend on the latent: give a head_dim above rope_dim"
            )
        if extra := [name for name in _NOT_SERVED if getattr(spec, name)]:
            raise UnsupportedError(f"{spec}: MLA is not served with {', '.join(extra)}")
        checks.check_rope(rope, spec.rope_dim, whole=True)
        super().__init__(spec, hidden_size, spec.value_dim, rope)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rank, self.rope_dim = spec.latent_rank, spec.rope_dim
        size, query_size = self.hidden_size, spec.heads * spec.head_dim
        self.q_proj = self.q_down = self.q_norm = self.q_up = None
        if spec.query_rank is None:
            self.q_proj = nn.Linear(size, query_size, bias=False, **where)
        else:
            self.q_down = nn.Linear(size, spec.query_rank, bias=False, **where)
            self.q_norm = RMSNorm(spec.query_rank, eps=norm_eps, **where)
            self.q_up = nn.Linear(spec.query_rank, query_size, bias=False, **where)
        self.kv_down = nn.Linear(size, self.rank + self.rope_dim, bias=False, **where)
        self.kv_norm = RMSNorm(self.rank, eps=norm_eps, **where)
        self.w_uk = nn.Parameter(torch.empty(spec.heads, spec.nope_dim, self.rank, **where))
        self.w_uv = nn.Parameter(torch.empty(spec.heads, spec.value_dim, self.rank, **where))
        self.o_proj = nn.Linear(spec.heads * spec.value_dim, size, bias=False, **where)
        for weight in (self.w_uk, self.w_uv):  # as nn.Linear(R, ...) would
            nn.init.uniform_(weight, -(self.rank**-0.5), self.rank**-0.5)

    def forward(
        self,
        hidden: Tensor,
        *,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        paradigm: Paradigm = "auto",
    ) -> Tensor:
        """Attend.

        Args:
            hidden: [B, S, E].
            positions: [S] or [B, S]; by default they follow what the cache holds.
            cache: the latents [B, 1, L, R] and rotary keys [B, 1, L, P] before these, to which
                these are added; without gradients.
            mask: boolean, True = attend; broadcasts to [B, H, S, L].
            paradigm: as in `headwise.latent_attention`; the results are equal.

        Returns:
            [B, S, E].

        Raises:
            ShapeError: shapes that do not fit. The cache is as it was.
            UnsupportedError: a cache while gradients are needed.
        """
        checks.check_hidden("hidden", hidden, self.hidden_size)
        checks.check_cache(cache, None)
        context = hidden.shape[1] + (0 if cache is None else cache.length)
        positions = self.start(hidden, cache, context, positions=positions, mask=mask)
        query_latent, latent, key_rope = self.compress(hidden, positions)
        latents, keys, kv = append(cache, latent.unsqueeze(1), key_rope.unsqueeze(1))
        if latents is not None and keys is not None:
            latent, key_rope = latents.squeeze(1), keys.squeeze(1)
        options: Any = {"kv": kv, "positions": positions, "mask": mask, "paradigm": paradigm}
        return self.attend(query_latent, latent, key_rope, **options)

    def compress(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B,S,E] to query latent [B,S,Q] (hidden itself where queries are not compressed),
        latent [B,S,R], rotary key [B,S,P]. What `attend` needs, and all that has to be kept where
        it is computed again in the backward pass.
        """
        latent, key_rope = self.kv_down(hidden).split([self.rank, self.rope_dim], dim=-1)
        if self.rope is not None:
            key_rope = self.rope(key_rope.unsqueeze(1), positions).squeeze(1)
        # norms stay in float32 under autocast
        query_latent, dtype = hidden, key_rope.dtype
        if self.q_down is not None and self.q_norm is not None:
            query_latent = self.q_norm(self.q_down(hidden)).to(dtype)
        return query_latent, self.kv_norm(latent).to(dtype), key_rope

    def attend(
        self,
        query_latent: Tensor,
        latent: Tensor,
        key_rope: Tensor,
        *,
        kv: KV | None = None,
        positions: Tensor,
        mask: Tensor | None = None,
        paradigm: Paradigm = "auto",
    ) -> Tensor:
        """From what `compress` gives, with L tokens of latent and rotary key, to [B,S,E].

        `kv`, a view of a cache, stands for both of them.
        """
        project = self.q_proj if self.q_up is None else self.q_up
        assert project is not None
        query = split_heads(project(query_latent), self.spec.heads)
        query_nope, query_rope = query.split([self.spec.nope_dim, self.rope_dim], dim=-1)
        if self.rope is not None:
            query_rope = self.rope(query_rope, positions)
        out = latent_attention(
            query_nope,
            query_rope,
            None if kv is not None else latent,
            None if kv is not None else key_rope,
            self.w_uk.to(latent.dtype),
            self.w_uv.to(latent.dtype),
            kv=kv,
            paradigm=paradigm,
            causal=self.spec.causal,
            scale=self.spec.scale,
            mask=mask,
        )
        assert isinstance(out, Tensor)
        return self.finish(out)

    @classmethod
    def from_pretrained_layer(cls, module: Any) -> "LatentAttention":
        """A copy of an MLA module of a Transformers model, weights and all.

        Serves DeepSeek-V2 and V3, GLM-4.7-Flash, MiniCPM3, A.X K1 and Youtu. Rotary keys are cached
        in the order of the weights, which for DeepSeek-V3 is not that of Transformers' own cache.
        Dropout of the attention is not taken over.

        Raises:
            UnsupportedError: another kind of module, or one with biases.
            SpecError: its config contradicts itself.
        """
        stock = PretrainedLayer.read(module, ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            if stock.has_bias(name):
                raise UnsupportedError(f"{name} has a bias, which LatentAttention has not")
        spec, layer = stock.spec, cls(**stock.arguments("kv_a_layernorm"))
        stock.fill(layer, _NAMES)
        up = module.kv_b_proj.weight.detach().view(spec.heads, -1, layer.rank)
        w_uk, w_uv = up.split([spec.nope_dim, spec.value_dim], dim=1)
        layer.w_uk.data.copy_(w_uk)
        layer.w_uv.data.copy_(w_uv)
        return layer

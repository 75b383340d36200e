"""What a linear attention module of Transformers says of itself, without importing Transformers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.errors import UnsupportedError
from headwise.spec import StateSpec


@dataclass(frozen=True)
class PretrainedState:
    """The spec of a module, and its weights by the names that they have in `LinearAttention`."""

    spec: StateSpec
    hidden_size: int
    norm_eps: float
    weights: Mapping[str, Tensor]


def read_linear(module: Any) -> PretrainedState:
    """Read `module`.

    Raises:
        UnsupportedError: another kind of module, or one that does more than what is built here.
    """
    kind = type(module)
    reader = _READERS.get(kind.__name__)
    if reader is None or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedError(
            f"{kind.__name__} is not copied: expected one of {', '.join(_READERS)}, such as "
            "model.model.layers[0].linear_attn"
        )
    for name, part in module.named_modules():
        if "proj" in name and type(part) is not nn.Linear:
            raise UnsupportedError(
                f"{kind.__name__}.{name} is a {type(part).__name__}: expected a torch.nn.Linear"
            )
        if "conv" in name and type(part) is not nn.Conv1d:
            raise UnsupportedError(
                f"{kind.__name__}.{name} is a {type(part).__name__}: expected a torch.nn.Conv1d"
            )
        own = type(part).__module__.startswith(("torch.nn.", "transformers."))
        if not own or "forward" in part.__dict__:
            raise UnsupportedError(
                f"{kind.__name__}.{name or 'forward'} is not Transformers' own: expected a module "
                "as the model made it; detach headwise first"
            )
        if type(part) is nn.Linear and part.bias is not None:
            raise UnsupportedError(f"{name} has a bias, which LinearAttention has not")
    if module.activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"{kind.__name__} has the activation {module.activation!r}: expected 'silu'"
        )
    return reader(module)


def _qwen3_next(module: Any) -> PretrainedState:
    heads, key_heads = module.num_v_heads, module.num_k_heads
    dim, value_dim, group = module.head_k_dim, module.head_v_dim, heads // key_heads
    size = module.hidden_size
    # each key head beside its value heads
    mixed = module.in_proj_qkvz.weight.view(key_heads, -1, size)
    *qkv, gate = mixed.split([dim, dim, group * value_dim, group * value_dim], dim=1)
    beta, decay = module.in_proj_ba.weight.view(key_heads, -1, size).chunk(2, dim=1)
    return PretrainedState(
        _spec(module, heads=heads, key_heads=key_heads, key_dim=dim, value_dim=value_dim),
        size,
        module.norm.variance_epsilon,
        {
            "qkv_proj.weight": torch.cat([each.flatten(0, 1) for each in qkv]),
            "conv_weight": module.conv1d.weight.squeeze(1),
            "decay_proj.weight": decay.flatten(0, 1),
            "A_log": module.A_log,
            "dt_bias": module.dt_bias,
            "beta_proj.weight": beta.flatten(0, 1),
            "gate_proj.weight": gate.flatten(0, 1),
            "norm_weight": module.norm.weight,
            "o_proj.weight": module.out_proj.weight,
        },
    )


def _kimi_linear(module: Any) -> PretrainedState:
    heads, dim, forget = module.num_heads, module.head_dim, module.forget_gate
    qkv = (module.q_proj, module.k_proj, module.v_proj)
    return PretrainedState(
        _spec(module, heads=heads, key_dim=dim, value_dim=dim, decay="dim"),
        module.hidden_size,
        module.o_norm.variance_epsilon,
        {
            "qkv_proj.weight": torch.cat([each.weight for each in qkv]),
            "conv_weight": module.conv1d.weight.squeeze(1),
            "decay_proj.0.weight": forget.f_a_proj.weight,
            "decay_proj.1.weight": forget.f_b_proj.weight,
            "A_log": forget.A_log.flatten(),
            "dt_bias": forget.dt_bias,
            "beta_proj.weight": module.b_proj.weight,
            "gate_proj.0.weight": module.g_a_proj.weight,
            "gate_proj.1.weight": module.g_b_proj.weight,
            "norm_weight": module.o_norm.weight,
            "o_proj.weight": module.o_proj.weight,
        },
    )


def _mamba2(module: Any) -> PretrainedState:
    if module.time_step_limit not in ((0.0, math.inf), [0.0, math.inf]):
        raise UnsupportedError(
            f"time_step_limit={module.time_step_limit!r:.60}: expected (0.0, inf), no limit"
        )
    inner, groups, heads = module.intermediate_size, module.n_groups, module.num_heads
    keys = groups * module.ssm_state_size
    gate, mixed, decay = module.in_proj.weight.split([inner, inner + 2 * keys, heads])

    def ordered(rows: Tensor) -> Tensor:
        """Of x, B and C: C is the query, B the key and x the value."""
        return torch.cat(rows.split([inner, keys, keys])[::-1])

    bias = module.conv1d.bias
    return PretrainedState(
        _spec(
            module,
            heads=heads,
            key_heads=groups,
            key_dim=module.ssm_state_size,
            value_dim=module.head_dim,
            delta=False,
        ),
        module.hidden_size,
        module.norm.variance_epsilon,
        {
            "qkv_proj.weight": ordered(mixed),
            "conv_weight": ordered(module.conv1d.weight.squeeze(1)),
            "conv_bias": ordered(mixed.new_zeros(len(mixed)) if bias is None else bias),
            "decay_proj.weight": decay,
            "A_log": module.A_log,
            "dt_bias": module.dt_bias,
            "skip": module.D,
            "gate_proj.weight": gate,
            "norm_weight": module.norm.weight,
            "o_proj.weight": module.out_proj.weight,
        },
    )


def _spec(module: Any, **sizes: Any) -> StateSpec:
    return StateSpec(conv_channels=module.conv_dim, conv_width=module.conv_kernel_size, **sizes)


_READERS: dict[str, Callable[[Any], PretrainedState]] = {
    "Qwen3NextGatedDeltaNet": _qwen3_next,
    "KimiLinearDeltaAttention": _kimi_linear,
    "Mamba2Mixer": _mamba2,
}

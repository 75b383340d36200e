"""The config of `headwise_mla`: a Llama whose attention was converted to MLA."""

from typing import Any, ClassVar

from transformers import LlamaConfig

from headwise.spec import ModelSpec
from headwise.spec.checks import boolean


class HeadwiseMlaConfig(LlamaConfig):
    """Llama's config, and the sizes of the latents.

    Example:
        >>> from headwise.hf import HeadwiseMlaConfig
        >>> config = HeadwiseMlaConfig(
        ...     num_hidden_layers=2,
        ...     kv_lora_rank=[512, 384],
        ...     qk_rope_head_dim=[64, 128],
        ...     qk_nope_head_dim=[128, 0],
        ...     v_head_dim=128,
        ...     attention_scale=128**-0.5,
        ... )
        >>> config.head_dim
        128

    Args:
        kv_lora_rank: R of each layer, the latent's size.
        qk_rope_head_dim: P of each layer, the rope key's size; even.
        qk_nope_head_dim: N of each layer, the size of a key's part that is not rotated: head_dim,
            or 0 where every key is rotated whole.
        v_head_dim: V, the size of a value head.
        attention_scale: factor of the scores; it does not follow from N + P.
        query_key_bias: whether the projections to queries, latents and rope keys have a bias, as
            Qwen2's. `attention_bias` is that of the output projection alone.

    Raises:
        SpecError: a field that is missing, or out of range, or a list of another length than
            num_hidden_layers; one line.
    """

    model_type = "headwise_mla"
    # Llama's, but for the attention: heads share the latents and are not split over devices
    base_model_tp_plan: ClassVar = {
        name: plan for name, plan in LlamaConfig.base_model_tp_plan.items() if ".mlp." in name
    }

    # Transformers before 5.20 makes one without fields, unless told that there is none
    has_no_defaults_at_init: ClassVar = True

    # Typed as what readers see: a None is refused in __post_init__, by one line of ours.
    kv_lora_rank: list[int] = None  # type: ignore[assignment]
    qk_rope_head_dim: list[int] = None  # type: ignore[assignment]
    qk_nope_head_dim: list[int] = None  # type: ignore[assignment]
    v_head_dim: int = None  # type: ignore[assignment]
    attention_scale: float = None  # type: ignore[assignment]
    query_key_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        boolean("query_key_bias", self.query_key_bias)
        ModelSpec.from_config(self)  # raises what its reader finds wrong

"""What can be converted, and to what; everything else is refused before any work."""

from collections.abc import Container
from typing import Any

from headwise.conversion.checkpoint.checkpoint import attentions
from headwise.conversion.methods.expansion import expanded_config
from headwise.conversion.target import Target
from headwise.errors import ConversionError, OptionError
from headwise.generation.options import context_limit
from headwise.spec import FAMILIES, AttentionSpec


def check(config: Any, target: Target) -> None:
    """Refuse a model that cannot be converted to `target`.

    Raises:
        ConversionError: a family or a target that cannot be; says why.
        SpecError: a config that contradicts itself.
    """
    family, specs = config.model_type, attentions(config)
    if not specs:
        raise ConversionError(f"model_type {family!r} has no decoder layers to convert")
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            "the checkpoint is quantised: convert the original in bfloat16 or float32"
        )
    spec = specs[0]
    if target.mechanism == "mha":
        if spec.latent_rank is None:
            raise ConversionError(
                f"model_type {family!r} is {spec.mechanism} already, and caches keys and values "
                "as they are: expected MLA to make mha of"
            )
        expanded_config(config)  # raises what stands in the way
        return
    if spec.latent_rank is not None:
        raise ConversionError(
            f"model_type {family!r} is MLA already: expected MHA or GQA to make {target} of"
        )
    if any(attention.qk_norm for attention in specs):
        raise ConversionError(
            f"model_type {family!r} normalises queries and keys per head (QK-norm): merged or "
            "latent keys are linear in the hidden state, and such keys are not"
        )
    covered = [name for name, each in FAMILIES.items() if each.converts]
    if family not in covered:
        raise ConversionError(
            f"model_type {family!r} is not covered: expected {', '.join(covered)}"
        )
    if target.mechanism == "mla" and any(attention.window is not None for attention in specs):
        raise ConversionError(
            f"{spec} has a sliding window, which MLA is not served with: convert it to gqa"
        )
    _check_sizes(spec, target)


def check_head(names: Container[str], config: Any) -> None:
    """Refuse the weights of a decoder without its language-model head.

    Raises:
        ConversionError: names the first weight that is missing.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    if head not in names:
        kind = (config.architectures or [config.model_type])[0]
        raise ConversionError(
            f"the checkpoint is a {kind} without a language-model head (no {head}), and what a "
            "conversion costs shows in next tokens: give the checkpoint with the head"
        )


def check_length(config: Any, length: int) -> None:
    """Refuse calibration sequences that a layer of the model cannot attend to from end to end.

    Raises:
        OptionError: longer than its positions or its windows reach.
    """
    limits = (context_limit(config), *(attention.window for attention in attentions(config)))
    reach = min((limit for limit in limits if limit is not None), default=length)
    if length > reach:
        raise OptionError(
            f"length is {length}, and the model's positions and windows reach {reach} "
            "tokens: give shorter sequences with --length"
        )


def _check_sizes(spec: AttentionSpec, target: Target) -> None:
    keys, values = spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim
    if target.mechanism == "gqa":
        fewer = [count for count in range(1, spec.kv_heads) if spec.kv_heads % count == 0]
        if target.kv_heads not in fewer:
            expected = ", ".join(str(Target("gqa", kv_heads=count)) for count in fewer)
            raise ConversionError(
                f"to is {str(target)!r}, and the model has {spec.kv_heads} kv heads: "
                + (f"expected one of {expected}" if fewer else "there are none to merge")
            )
    elif (target.rope_dim or 0) > keys or (target.rank or 0) > keys + values:
        raise ConversionError(
            f"to is {str(target)!r}, and the model has {keys} dims of keys and {values} of values "
            f"per token: expected a rope of at most {keys} and a rank of at most {keys + values}"
        )

"""What can be converted, and to what; everything else is refused before any work."""

from collections.abc import Container
from typing import Any

from headwise.conversion.methods.expansion import expanded_config
from headwise.conversion.target import Target
from headwise.errors import ConversionError, OptionError
from headwise.generation.options import context_limit
from headwise.spec import AttentionSpec, ModelSpec

# Families built as Llama is, whose tensors have Llama's names.
FAMILIES = ("llama", "mistral", "qwen2")


def check(config: Any, target: Target) -> AttentionSpec:
    """The attention of a model's layers, which are all alike but for windows.

    Raises:
        ConversionError: a family or a target that cannot be; says why.
        SpecError: a config that contradicts itself.
    """
    family, spec = config.model_type, ModelSpec.from_config(config)
    specs = {at.attention for at in spec.layers}
    found = next((at for at in specs if at is not None), None)
    if found is None:
        raise ConversionError(f"model_type {family!r} has no decoder layers to convert")
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            "the checkpoint is quantised: convert the original in bfloat16 or float32"
        )
    if target.mechanism == "mha":
        if found.latent_rank is None:
            raise ConversionError(
                f"model_type {family!r} is {found.mechanism} already, and caches keys and values "
                "as they are: expected MLA to make mha of"
            )
        expanded_config(config)  # raises what stands in the way
        return found
    if found.latent_rank is not None:
        raise ConversionError(
            f"model_type {family!r} is MLA already: expected MHA or GQA to make {target} of"
        )
    if any(at is not None and at.qk_norm for at in specs):
        raise ConversionError(
            f"model_type {family!r} normalises queries and keys per head (QK-norm): merged or "
            "latent keys are linear in the hidden state, and such keys are not"
        )
    if family not in FAMILIES:
        raise ConversionError(
            f"model_type {family!r} is not covered: expected {', '.join(FAMILIES)}"
        )
    if target.mechanism == "gqa":
        _check_groups(found, target)
    else:
        if any(at is not None and at.window is not None for at in specs):
            raise ConversionError(
                f"{found} has a sliding window, which MLA is not served with: convert it to gqa"
            )
        _check_latent(found, target)
    return found


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
    """Refuse calibration sequences that a model does not see whole.

    Raises:
        OptionError: longer than its positions or its windows reach.
    """
    limit = context_limit(config)
    windows = [at.attention.window for at in ModelSpec.from_config(config).layers if at.attention]
    reached = [at for at in (limit, *windows) if at is not None]
    if reached and length > min(reached):
        raise OptionError(
            f"length is {length}, and the model's positions and windows reach {min(reached)} "
            "tokens: give shorter sequences with --length"
        )


def _check_groups(spec: AttentionSpec, target: Target) -> None:
    count = target.kv_heads or 1
    if count >= spec.kv_heads or spec.kv_heads % count:
        fewer = [at for at in range(1, spec.kv_heads) if spec.kv_heads % at == 0]
        expected = ", ".join(f"gqa:{at}" if at > 1 else "mqa" for at in fewer)
        raise ConversionError(
            f"to is {str(target)!r}, and the model has {spec.kv_heads} kv heads: "
            + (f"expected one of {expected}" if fewer else "there are none to merge")
        )


def _check_latent(spec: AttentionSpec, target: Target) -> None:
    if target.rank is None or target.rope_dim is None:
        return
    keys, values = spec.kv_heads * spec.head_dim, spec.kv_heads * spec.value_dim
    if target.rope_dim > keys or target.rank > keys + values:
        raise ConversionError(
            f"to is {str(target)!r}, and the model has {keys} dims of keys and {values} of values "
            f"a token: expected a rope of at most {keys} and a rank of at most {keys + values}"
        )

"""Which attention a model runs with, and what that says about its layers."""

from dataclasses import dataclass, field
from typing import Any

from headwise.errors import SpecError, UnsupportedError
from headwise.generation.options import check_attention


@dataclass(frozen=True)
class Mechanism:
    """Equal layers of a model: how many, their attention in words, what ran and what did not.

    `others` pairs each backend that did not run with the reason why. `cache` is what held the keys,
    by the names that `headwise.attach` takes; "Transformers" where it was not ours.
    """

    layers: int
    mechanism: str
    backend: str
    others: tuple[tuple[str, str], ...] = field(default=())
    cache: str = "Transformers"


def select_attention(
    model: Any, attention: str, cache: str = "contiguous"
) -> tuple[Mechanism, ...]:
    """Make a model run with "headwise", "sdpa" or "eager", whatever it ran with before.

    `cache` is for headwise, by the names that `headwise.attach` takes.

    Raises:
        OptionError: another name.
        UnsupportedError: the model does not have that implementation.
    """
    check_attention(attention)
    from headwise.hf import attach, detach

    detach(model)
    if attention == "headwise":
        return _attached(attach(model, cache=cache))
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} has no {attention} attention in Transformers; use "
            f"{'eager' if attention == 'sdpa' else 'sdpa'} or headwise"
        ) from error
    return tuple(
        Mechanism(count, words, f"Transformers {attention}")
        for count, words in _layers(model.config)
    )


def _attached(report: Any) -> tuple[Mechanism, ...]:
    """Group the layers of an AttachReport that are alike."""
    counts: dict[tuple[str, str, tuple[tuple[str, str], ...], str], int] = {}
    for layer in report.layers:
        accepted = next((verdict for verdict in layer.decode if verdict.accepted), None)
        others = tuple(
            (verdict.backend, f"slower: {verdict.reason}" if verdict.accepted else verdict.reason)
            for verdict in layer.decode
            if verdict is not accepted
        )
        words = str(layer.spec) if layer.spec is not None else "read at run time"
        backend = accepted.backend if accepted is not None else "headwise, by shape"
        key = (words, backend, others, layer.cache)
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        Mechanism(count, words, backend, others, cache)
        for (words, backend, others, cache), count in counts.items()
    )


def _layers(config: Any) -> list[tuple[int, str]]:
    """Each kind of layer that a config has: how many, and its mechanism in words."""
    from headwise.spec import ModelSpec

    try:
        groups = ModelSpec.from_config(config).layer_groups()
    except SpecError:
        text = config.get_text_config(decoder=True)
        return [(int(text.num_hidden_layers), f"{text.model_type} (not covered)")]
    return [(len(indices), str(layer)) for layer, indices in groups]

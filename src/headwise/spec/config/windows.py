"""Windows of models whose layers differ: which layers slide, and over how many tokens."""

from collections.abc import Collection, Sequence

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.fields import ConfigFields

_SLIDES = {"full_attention": False, "sliding_attention": True}
# What configs written before Transformers 5 call them.
_OLD_KINDS = {"attention": "full_attention", "mamba": "linear_attention"}


def layer_kinds(
    fields: ConfigFields, layers: int, *, known: Collection[str]
) -> Sequence[str] | None:
    """layer_types, one of the `known` kinds for each layer; None where the config has none.

    >>> layer_kinds(ConfigFields({"layer_types": ["full_attention"]}), 1, known=["full_attention"])
    ['full_attention']

    Raises:
        SpecError: when it has another length than the model, or a kind that is not known.
    """
    types = fields.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list | tuple) or len(types) != layers:
        length = f"{len(types)} entries" if isinstance(types, list | tuple) else shown(types)
        raise SpecError(
            f"layer_types has {length}: expected one for each of the "
            f"num_hidden_layers={layers} layers"
        )
    types = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise SpecError(
            f"layer_types contains {shown(unknown[0])}, which is not covered: "
            f"expected {' or '.join(map(repr, known))}"
        )
    return types


def layer_windows(
    fields: ConfigFields, window: int | None, default: Sequence[bool]
) -> list[int | None]:
    """Window of each layer, None for full attention, from layer_types.

    `default` says which layers slide where the config has no layer_types.

    >>> fields = ConfigFields({"layer_types": ["sliding_attention", "full_attention"]})
    >>> layer_windows(fields, 128, default=[False, False])
    [128, None]

    Raises:
        SpecError: when layer_types has another length than the model, a kind of attention that
            is not covered, or sliding layers while there is no window.
    """
    types = layer_kinds(fields, len(default), known=_SLIDES)
    slides = list(default) if types is None else [_SLIDES[kind] for kind in types]
    if any(slides) and window is None:
        raise SpecError(
            f"sliding_window is not set while {sum(slides)} of {len(slides)} layers slide: "
            "expected the window's tokens (and use_sliding_window, where the family has it)"
        )
    return [window if slide else None for slide in slides]


def used_window(fields: ConfigFields) -> int | None:
    """sliding_window where use_sliding_window is on: published configs have one that is off.

    >>> used_window(ConfigFields({"use_sliding_window": True, "sliding_window": 4096}))
    4096
    """
    used = fields.flag("use_sliding_window")
    return fields.optional_positive("sliding_window") if used else None

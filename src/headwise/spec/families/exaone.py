"""EXAONE 4 and K-EXAONE: windows in 3 of 4 layers or in none, QK-norm."""

from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout
from headwise.spec.config.stacks import LLAMA_DEFAULTS, grouped_stack, nth_full

_DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}


def _read(fields: ConfigFields) -> Layout:
    window = fields.optional_positive("sliding_window")
    # Published configs have a pattern in words ("LLLG") beside layer_types, and without a window
    # every layer is full.
    named = window is None or fields.raw("layer_types") is not None
    nth = 1 if named else fields.positive("sliding_window_pattern")
    return grouped_stack(fields, nth_full(fields, nth, window), qk_norm=True)


EXAONE4 = Family(model_type="exaone4", read=_read, defaults=_DEFAULTS)
EXAONE_MOE = Family(model_type="exaone_moe", read=_read, defaults=_DEFAULTS)

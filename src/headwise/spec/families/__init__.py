"""The families that headwise knows, a file per kind: whatever it knows of a model_type is there.

A file is found by being here. It holds `Family` objects, and `Composite` ones for multimodal types.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Composite, Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.layout import Layout


def _declared() -> Iterator[Family | Composite]:
    for module in sorted(iter_modules(__path__), key=lambda module: module.name):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Family | Composite):
                yield value


_DECLARED = tuple(_declared())
FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in _DECLARED if isinstance(family, Family)
}
_COMPOSITES: Mapping[str, Composite] = {
    composite.model_type: composite for composite in _DECLARED if isinstance(composite, Composite)
}


def family_of(model_type: str | None) -> Family | None:
    """The family of a model_type, of its text part for a multimodal one; None if it is not known.

    >>> family_of("gemma3").model_type, family_of("mamba")
    ('gemma3_text', None)
    """
    composite = _COMPOSITES.get(model_type or "")
    if composite is not None:
        model_type = composite.text
    return FAMILIES.get(model_type or "")


def read_config(config: object) -> tuple[str, Layout]:
    """Read `config` as the family that its model_type names, and return both.

    >>> family, layout = read_config({"model_type": "gpt2"})
    >>> family, len(layout.layers), layout.max_context
    ('gpt2', 12, 1024)

    Raises:
        SpecError: naming the field, for an unknown model_type or an inconsistent config.
    """
    outer = ConfigFields(config)
    model_type = outer.model_type()
    composite = _COMPOSITES.get(model_type, Composite(model_type=model_type))
    text = outer.raw("text_config")
    instead: dict[str, object] = {}
    if text is not None or composite.text is not None:
        if text is not None or not composite.flat:
            config = composite.alone if text is None else text
        inner = ConfigFields(config)
        # The class that runs is the outer one.
        instead["architectures"] = outer.raw("architectures")
        instead |= {
            name: value for name, value in composite.sets.items() if inner.raw(name) is None
        }
        if composite.text is None or inner.raw("model_type") != model_type:
            model_type = inner.model_type(default=composite.text)
        else:  # named as the whole is
            model_type = composite.text
        model_type = composite.renamed.get(model_type, model_type)
    family = FAMILIES.get(model_type)
    if family is None and model_type in _COMPOSITES:
        raise SpecError(f"text_config is missing: expected it in a config of {model_type!r}")
    if family is None:
        known = sorted(
            [*FAMILIES, *(each.model_type for each in _COMPOSITES.values() if each.text)]
        )
        near = get_close_matches(model_type, known, n=3) or known[:3]
        raise SpecError(
            f"model_type={shown(model_type)} is not covered: expected one of {len(known)}, as "
            f"{', '.join(near)}"
        )
    fields = ConfigFields(config, defaults=family.defaults, aliases=family.aliases, instead=instead)
    if fields.raw("per_layer_config") and not family.per_layer:
        raise SpecError(
            "per_layer_config overrides fields of single layers, which is not covered: "
            f"expected a {model_type} config whose fields hold for every layer"
        )
    if fields.raw("is_causal") is False:
        raise SpecError(
            f"is_causal=False turns {model_type}'s causal masks off, which is not covered: "
            "expected the family's own masks; leave it out"
        )
    return model_type, family.read(fields)


def config_fields(config: object) -> ConfigFields:
    """The fields of a family's own config, with its defaults.

    Raises:
        SpecError: a model_type that is not known.
    """
    family = FAMILIES[ConfigFields(config).model_type()]
    return ConfigFields(config, defaults=family.defaults, aliases=family.aliases)

"""What a reader declares about one model_type."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from headwise.spec.readers.fields import ConfigFields
from headwise.spec.readers.layout import Layout


@dataclass(frozen=True)
class Family:
    """How to read one model_type.

    Args:
        read: makes the layers from the fields.
        defaults: the defaults of Transformers' config class, for every field that `read` uses;
            config.json files leave out what equals them.
        aliases: other names under which a config may give a field.
    """

    read: Callable[[ConfigFields], Layout]
    defaults: Mapping[str, object]
    aliases: Mapping[str, str] = field(default_factory=dict)

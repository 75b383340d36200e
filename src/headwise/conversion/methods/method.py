"""What every method is: the config of the result, and a layer's new tensors from its old ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.statistics import LayerStatistics

# Of a config, what says which architecture it is of, and which file.
_OF_THE_FILE = {"model_type", "architectures", "transformers_version", "dtype"}


@dataclass(frozen=True)
class Method:
    """A way to make another attention of a layer's.

    Args:
        config: the result's Transformers config.
        layer_class: its class of decoder layers.
        convert: makes the tensors of layer `index`'s new `self_attn`; by the weights alone where
            there are no statistics.
    """

    config: Any
    layer_class: Any
    convert: Callable[[int, Projections, LayerStatistics | None], dict[str, Tensor]]


def adapted_config(kind: Any, config: Any, like: Any = None, **changes: Any) -> Any:
    """A config of the class `kind` with the values of another architecture's, and `changes`.

    Args:
        like: the class of configs whose names are carried over; None carries over all.
    """
    names = set(config.to_dict() if like is None else like().to_dict()) - _OF_THE_FILE
    values = {name: value for name, value in config.to_dict().items() if name in names}
    made = kind(**values | changes)
    made.dtype = config.dtype
    made.architectures = [f"{kind.__name__.removesuffix('Config')}ForCausalLM"]
    return made

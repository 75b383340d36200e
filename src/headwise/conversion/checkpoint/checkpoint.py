"""A model's folder, opened once and handed down."""

from functools import cached_property
from typing import Any

from headwise.conversion.checkpoint.weights import StoredWeights
from headwise.loading.model_folder import ModelFolder
from headwise.spec import AttentionSpec, ModelSpec


class Checkpoint(ModelFolder):
    """A folder with its config; what else is in it is opened once, when it is needed.

    Raises:
        LoadError: a file that is missing or damaged.
    """

    @cached_property
    def attention(self) -> AttentionSpec:
        """The attention of its layers, which are all alike but for windows."""
        return attentions(self.config)[0]

    @cached_property
    def weights(self) -> StoredWeights:
        """Read one tensor at a time."""
        return StoredWeights(self.folder)


def attentions(config: Any) -> list[AttentionSpec]:
    """The attention of each decoder layer that has one.

    Raises:
        SpecError: a config that contradicts itself.
    """
    mixers = [layer.mixer for layer in ModelSpec.from_config(config).layers]
    return [mixer for mixer in mixers if isinstance(mixer, AttentionSpec)]

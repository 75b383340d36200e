"""A model's folder, opened once and handed down."""

from functools import cached_property
from pathlib import Path
from typing import Any

from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.weights import StoredWeights
from headwise.loading.load import load_config, load_model, load_tokenizer
from headwise.spec import AttentionSpec, ModelSpec


class Checkpoint:
    """A folder with its config; what else is in it is opened once, when it is needed.

    Raises:
        LoadError: a file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, load_config(folder)

    @cached_property
    def attention(self) -> AttentionSpec:
        """The attention of its layers, which are all alike but for windows."""
        return attentions(self.config)[0]

    @cached_property
    def weights(self) -> StoredWeights:
        """Read one tensor at a time."""
        return StoredWeights(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer."""
        return load_tokenizer(self.folder)

    def load(
        self, progress: Progress = silent, *, dtype: str = "auto", attention: str = "sdpa"
    ) -> Any:
        """The whole model in memory.

        Raises:
            CapacityError: it would not fit.
        """
        return load_model(
            self.folder, self.config, dtype=dtype, attention=attention, progress=progress
        )


def attentions(config: Any) -> list[AttentionSpec]:
    """The attention of each decoder layer that has one.

    Raises:
        SpecError: a config that contradicts itself.
    """
    mixers = [layer.mixer for layer in ModelSpec.from_config(config).layers]
    return [mixer for mixer in mixers if isinstance(mixer, AttentionSpec)]

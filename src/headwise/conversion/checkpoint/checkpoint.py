"""A model's folder, opened once and handed down."""

from functools import cached_property
from pathlib import Path
from typing import Any

from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.weights import StoredWeights
from headwise.loading.load import load_config, load_model, load_tokenizer


class Checkpoint:
    """The config of a model's folder; its weights and its tokenizer, opened when they are needed.

    Raises:
        LoadError: a file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, load_config(folder)

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

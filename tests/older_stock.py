"""What these tests write in the words of the newest Transformers, said to an older one.

Import it for that. `needs` skips a test of what an older release does not have itself.
"""

import warnings
from typing import Any

import pytest
import transformers
from packaging.version import Version
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from headwise.hf.stock_names import CACHE

_INSTALLED = Version(transformers.__version__)


def needs(release: str, why: str) -> pytest.MarkDecorator:
    """Skips a test where Transformers is older than `release`."""
    return pytest.mark.skipif(
        Version(release) > _INSTALLED, reason=f"Transformers {_INSTALLED}: {why} (from {release})"
    )


def _renamed(function: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if "cache" in options:
            options[CACHE] = options.pop("cache")
        return function(self, *args, **options)

    return call


if CACHE != "cache":  # before 5.24
    PreTrainedModel.__call__ = _renamed(nn.Module.__call__)
    GenerationMixin.generate = _renamed(GenerationMixin.generate)
    ModelOutput.cache = property(lambda output: output.get(CACHE))
    with warnings.catch_warnings():  # it calls torch.jit.script, up to 5.22
        warnings.simplefilter("ignore", DeprecationWarning)
        import transformers.models.gpt_bigcode.modeling_gpt_bigcode
if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # before 5.23
    PreTrainedModel.activation_checkpointing_enable = PreTrainedModel.gradient_checkpointing_enable

"""Transformers' model and caches of a planned one, made without memory."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from headwise.base.files import FAULTS, one_line
from headwise.errors import SpecError, UnsupportedError
from headwise.planning.model import PlannedModel
from headwise.spec import FAMILIES

# What a config says beside the model's shapes; some of it needs packages that are not installed.
_SPECIAL = ("Infinity", "-Infinity", "NaN")
_NOT_SHAPES = {
    *("_attn_implementation", "attn_implementation", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "quantization_config", "transformers_version"),
}


def build_on_meta(model: PlannedModel, dtype: str = "bfloat16") -> Any:
    """Transformers' model for a config, on the meta device: shapes, and no memory.

    Raises:
        SpecError: Transformers does not take the config.
        UnsupportedError: a family that Transformers has no model of.
    """
    config = transformers_config(model)
    with torch.device("meta"), transformers_takes(model):
        made = _model_class(model)
        # an Auto class, or a class itself
        build = getattr(made, "from_config", None) or made._from_config
        return build(config, dtype=getattr(torch, dtype))


def transformers_config(model: PlannedModel) -> Any:
    """The config as Transformers' object.

    Raises:
        SpecError: Transformers does not take it.
        UnsupportedError: a family that Transformers has no model of.
    """
    from transformers import AutoConfig

    if not FAMILIES[model.spec.family].in_transformers:
        raise UnsupportedError(f"{model.name}: Transformers has no model of this family to run")
    # config classes write into the nested dicts that they are given: these are new ones
    fields = _floats({key: value for key, value in model.config.items() if key not in _NOT_SHAPES})
    with transformers_takes(model):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        padding = getattr(config, "pad_token_id", None)
        # Fine-tunes have a padding token beyond the vocabulary, and no row for it.
        if isinstance(padding, int) and padding >= getattr(config, "vocab_size", padding + 1):
            config.pad_token_id = None
        return config


def _floats(value: Any) -> Any:
    """A value of a config.json with its infinities, which Transformers writes as tagged words."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _SPECIAL:
            return float(value["__float__"])
        return {key: _floats(each) for key, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


@contextmanager
def transformers_takes(model: PlannedModel) -> Iterator[None]:
    """What Transformers raises for a config that it does not take, as one line.

    Raises:
        SpecError: in place of what its config classes, modules and caches raise.
    """
    from huggingface_hub.errors import StrictDataclassError

    faults = (*FAULTS, ImportError, StrictDataclassError)
    refused = f"{model.name}: Transformers does not take this config"
    with one_line(refused, kind=SpecError, faults=faults), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _model_class(model: PlannedModel) -> Any:
    """The class of Transformers that makes such a model: encoder, encoder-decoder or decoder."""
    import transformers

    family = FAMILIES[model.spec.family]
    if not model.spec.layers:
        return getattr(transformers, family.encoder_class)
    if family.decoder_class is not None:
        return getattr(transformers, family.decoder_class)
    if model.spec.encoder_layers:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM

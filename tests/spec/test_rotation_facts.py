"""What a `Family` says of its rotation, held against the rotary code of Transformers' module."""

import inspect
import sys
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from headwise.spec import FAMILIES


def rotary_class(name: str) -> Any:
    """The class of the rotary embedding of text in the module of a family, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import of some modules, in older releases
        module = sys.modules[getattr(transformers, MODEL_MAPPING_NAMES[name]).__module__]
    kinds = [
        kind
        for title, kind in vars(module).items()
        if title.endswith("RotaryEmbedding") and kind.__module__ == module.__name__
    ]
    return next((kind for kind in kinds if "Vision" not in kind.__name__), None)


IN_TRANSFORMERS = [
    name
    for name, family in FAMILIES.items()
    if family.in_transformers and not name.startswith("headwise")
]
every_family = pytest.mark.parametrize("name", IN_TRANSFORMERS)


def rotary(name: str, part: float) -> tuple[Any, int]:
    """The embedding of a config that asks for a part of each head; the dims that it turns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the heads of these do not divide their hidden size
        sizes = {"head_dim": 128} if name in ("glm4_moe", "glm4v_moe_text") else {}
        config = AutoConfig.for_model(name, **sizes)
    parameters = config.rope_parameters
    each = [parameters] if "rope_theta" in parameters else parameters.values()
    for settings in each:
        settings |= {"rope_type": "default", "partial_rotary_factor": part}
        if name.startswith("glm4v"):
            settings["mrope_section"] = [16, 24, 24]  # for heads of 128
    embedding = rotary_class(name)(config)
    frequencies = next(at for title, at in embedding.named_buffers() if "inv_freq" in title)
    return embedding, 2 * frequencies.numel()


@every_family
def test_a_partial_rotary_factor_counts_where_the_family_says(name: str) -> None:
    if rotary_class(name) is None:
        assert not FAMILIES[name].partial_rope
        return
    whole, half = (rotary(name, part)[1] for part in (1.0, 0.5))
    assert half in (whole, whole // 2)
    assert FAMILIES[name].partial_rope == (half < whole)


@every_family
def test_the_pairs_of_a_rotation_lie_where_the_family_says(name: str) -> None:
    if rotary_class(name) is None:
        assert not FAMILIES[name].interleaved_rope
        return
    embedding, dims = rotary(name, 1.0)
    module = sys.modules[type(embedding).__module__]
    ones = torch.zeros(2, 2, 2, dims)  # as many heads as tokens: some take them in turn
    ones[0, ..., 0] = ones[1, ..., 1] = 1.0
    kinds = inspect.signature(embedding.forward).parameters
    options = {"layer_type": "full_attention"} if "layer_type" in kinds else {}
    angles = embedding(ones, torch.tensor([[0, 1]]), **options)
    if isinstance(angles, torch.Tensor):  # one complex number for cosine and sine
        turned = module.apply_rotary_emb(ones, ones, angles)[0]
    else:
        rotate = getattr(module, "apply_rotary_pos_emb", None)
        rotate = rotate or module.apply_rotary_pos_emb_interleave
        alone = "x" in inspect.signature(rotate).parameters
        turned = rotate(ones, *angles) if alone else rotate(ones, ones, *angles)[0]
    # the token at position 1 has its first dim turned by one radian, with the other of its pair
    first, second = turned[:, 1, 1]
    places = first.nonzero().flatten()
    assert sorted(first[places].tolist()) == pytest.approx([0.5403023059, 0.8414709848], abs=1e-6)
    assert FAMILIES[name].interleaved_rope == torch.equal(places, second.nonzero().flatten())

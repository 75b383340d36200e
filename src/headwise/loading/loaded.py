"""What Transformers says after loading: weights it made up, and weights it passed over.

Both are a warning there, and an answer that looks right. Here they are refused, but for what a
model's class, or the kind of weight, says is no part of the decoder's computation.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from headwise.errors import LoadError

# By the last part of a name: buffers that older versions of Transformers saved beside the weights,
# and the scales of an 8-bit cache that Transformers does not have.
_BUFFERS = re.compile(
    r"(inv_freq|(cos|sin)_cached|masked_bias|position_ids|attn\.bias|attention\.bias"
    r"|\.(k|v|kv)_scale)$"
)
# By the first parts of a name: heads for other tasks, and parts that see or hear; they hang beside
# the decoder, which computes the same without them.
_BESIDE = re.compile(
    r"^((base_)?model\.|transformer\.|language_model\.)*"
    r"(score|classifier|classification_head|qa_outputs|v_head|value_head|pooler|cls|mtp|"
    r"\w*(vision|visual|image|audio|speech|video|multi_?modal)\w*|mm_\w+)\."
)


def check_loading(place: Path, loading: dict[str, Any], model: Any) -> None:
    """Refuse what `from_pretrained`'s loading info says was made up, left over or of another shape.

    Raises:
        LoadError: names the first weight.
    """
    _check_made_up(place, loading, loading["missing_keys"])
    check_left(place, loading["unexpected_keys"], model)


def check_encoder(place: Path, loading: dict[str, Any], model: Any) -> None:
    """As check_loading, for an encoder without a head: heads and poolers may lack or be left.

    Raises:
        LoadError: names an embedding or a layer's weight.
    """
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.named_children()} - {"pooler"}

    def inside(names: Iterable[str]) -> list[str]:
        own = (name for name in names if name.removeprefix(prefix).split(".")[0] in parts)
        return [name for name in own if not _BUFFERS.search(name)]

    _check_made_up(place, loading, inside(loading["missing_keys"]))
    _refuse_left(place, inside(loading["unexpected_keys"]), model)


def check_left(place: Path, names: Iterable[str], model: Any) -> None:
    """Refuse weights, by name, that a decoder does not use though they are part of it.

    Raises:
        LoadError: names the first weight.
    """
    _refuse_left(place, [name for name in names if not _is_beside(name, model)], model)


def _check_made_up(place: Path, loading: dict[str, Any], missing: Collection[str]) -> None:
    """Refuse weights that Transformers made up: `missing` ones, and those of another shape."""
    if missing:
        raise LoadError(
            f"{place} lacks {len(missing)} weights that its config asks for, first "
            f"{min(missing)}: config and weights are not of one model"
        )
    for name, stored, asked in sorted(loading["mismatched_keys"]):
        raise LoadError(
            f"{place} holds {name} of shape {list(stored)} where its config asks for "
            f"{list(asked)}: config and weights are not of one model"
        )


def _refuse_left(place: Path, names: list[str], model: Any) -> None:
    if names:
        raise LoadError(
            f"{place} holds {len(names)} weights that {type(model).__name__} with this config does "
            f"not use, first {min(names)}: config and weights are not of one model"
        )


def _is_beside(name: str, model: Any) -> bool:
    """Whether a weight is one that the model's attention and layers never use."""
    ignored = (_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ()))
    if _BESIDE.match(name) or any(re.search(pattern, name) for pattern in ignored):
        return True
    # Layers after the last one, which predict further tokens (DeepSeek-V3, GLM-4.5).
    config = model.config.get_text_config()
    first, ahead = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    layer = re.search(r"\blayers\.(\d+)\.", name)
    return layer is not None and first <= int(layer[1]) < first + ahead

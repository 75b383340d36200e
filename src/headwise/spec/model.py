"""A whole model as data: one LayerSpec per layer, and what its cache costs."""

from dataclasses import dataclass

from headwise.errors import ShapeError, SpecError
from headwise.spec.checks import positive_int
from headwise.spec.dtypes import Dtype, bytes_per_element
from headwise.spec.families import read_config
from headwise.spec.layer import LayerSpec


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelSpec:
    """The attention of every layer of a model.

    >>> spec = ModelSpec.from_config(
    ...     {
    ...         "model_type": "llama",
    ...         "hidden_size": 576,
    ...         "num_hidden_layers": 30,
    ...         "num_attention_heads": 9,
    ...         "num_key_value_heads": 3,
    ...         "max_position_embeddings": 8192,
    ...     }
    ... )
    >>> print(spec)
    llama, context up to 8192: 30 x GQA 9/3 heads, D 64
    >>> spec.cache_bytes_per_token("bf16"), spec.cache_bytes(context=4096)
    (23040, 94371840)

    Args:
        family: the config's model_type (of its text part, for a multimodal model).
        layers: decoder layers; empty for a model that is an encoder only.
        encoder_layers: layers that attend to both sides and cache nothing.
        max_context: tokens that the model takes, None where positions set no limit (T5).

    Raises:
        SpecError: when there is no layer or a layer is out of order.
    """

    family: str
    layers: tuple[LayerSpec, ...]
    encoder_layers: tuple[LayerSpec, ...] = ()
    max_context: int | None

    def __post_init__(self) -> None:
        if not self.layers and not self.encoder_layers:
            raise SpecError(f"layers is empty for {self.family}: expected at least one layer")
        for name in ("layers", "encoder_layers"):
            indices = [layer.index for layer in getattr(self, name)]
            if indices != list(range(len(indices))):
                raise SpecError(
                    f"{name} have the indices {indices}: expected 0, 1, 2, ... in order"
                )
        for layer in self.layers:
            if layer.shares is not None and self.layers[layer.shares].cached is None:
                raise SpecError(
                    f"layer {layer.index} shares the keys of layer {layer.shares}, which caches "
                    "none: expected one that does"
                )
        if self.max_context is not None:
            positive_int("max_context", self.max_context)

    @classmethod
    def from_config(cls, config: object) -> "ModelSpec":
        """Read a Hugging Face config: the object, its dict, or a parsed config.json.

        Fields that a config.json leaves out get the default of Transformers' config class.

        >>> ModelSpec.from_config({"model_type": "mamba"})
        Traceback (most recent call last):
        headwise.errors.SpecError: model_type='mamba' is not covered: expected one of ...

        Raises:
            SpecError: naming the field, for an unknown model_type or an inconsistent config.
        """
        family, layout = read_config(config)
        return cls(
            family=family,
            layers=layout.layers,
            encoder_layers=layout.encoder_layers,
            max_context=layout.max_context,
        )

    @property
    def has_cross_attention(self) -> bool:
        """Whether any decoder layer attends to an encoder's output."""
        return any(layer.cross_attention is not None for layer in self.layers)

    def cache_bytes(
        self,
        context: int,
        batch: int = 1,
        dtype: Dtype = "bfloat16",
        encoder_context: int | None = None,
    ) -> int:
        """Bytes that the caches of all layers hold for `batch` sequences of `context` tokens.

        `encoder_context` counts the encoder's tokens, for models with cross-attention only.

        Raises:
            ShapeError: for a negative context, a `batch` below 1, or an `encoder_context` that
                is missing or that no layer would use.
            SpecError: for an unknown dtype.
        """
        if self.has_cross_attention and encoder_context is None:
            raise ShapeError(
                f"encoder_context is missing: {self.family} has cross-attention, whose cache "
                "grows with the encoder's tokens; give their number"
            )
        if not self.has_cross_attention and encoder_context is not None:
            raise ShapeError(
                f"encoder_context={encoder_context}: {self.family} has no cross-attention; "
                "leave it out"
            )
        return sum(
            layer.cache_bytes(context, batch, dtype, encoder_context or 0) for layer in self.layers
        )

    def cache_bytes_per_token(self, dtype: Dtype = "bfloat16") -> int:
        """Bytes that one more token of context adds, while the context is below every window.

        Raises:
            SpecError: for an unknown dtype.
        """
        elements = sum(
            layer.cached.cache_elements_per_token
            for layer in self.layers
            if layer.cached is not None
        )
        return elements * bytes_per_element(dtype)

    def layer_groups(self) -> tuple[tuple[LayerSpec, tuple[int, ...]], ...]:
        """Decoder layers that are equal but for their index: the first of each and all indices.

        >>> spec = ModelSpec.from_config({"model_type": "gpt_oss", "num_hidden_layers": 4})
        >>> for layer, indices in spec.layer_groups():
        ...     print(indices, layer)
        (0, 2) GQA 64/8 heads, D 64, window 128, sinks
        (1, 3) GQA 64/8 heads, D 64, sinks
        """
        return _groups(self.layers)

    def encoder_groups(self) -> tuple[tuple[LayerSpec, tuple[int, ...]], ...]:
        """`layer_groups` of the encoder."""
        return _groups(self.encoder_layers)

    def __repr__(self) -> str:
        return f"<ModelSpec {self}>"

    def __str__(self) -> str:
        limit = "any context" if self.max_context is None else f"context up to {self.max_context}"
        stacks = []
        if self.encoder_layers:
            stacks.append(f"encoder {_summary(self.encoder_layers)}")
        if self.layers:
            prefix = "decoder " if self.encoder_layers else ""
            stacks.append(prefix + _summary(self.layers))
        return f"{self.family}, {limit}: {' | '.join(stacks)}"


def _groups(layers: tuple[LayerSpec, ...]) -> tuple[tuple[LayerSpec, tuple[int, ...]], ...]:
    groups: dict[object, list[LayerSpec]] = {}
    for layer in layers:
        key = (layer.mixer, layer.cross_attention, layer.shares)
        groups.setdefault(key, []).append(layer)
    return tuple(
        (members[0], tuple(layer.index for layer in members)) for members in groups.values()
    )


def _summary(layers: tuple[LayerSpec, ...]) -> str:
    return " + ".join(f"{len(indices)} x {layer}" for layer, indices in _groups(layers))

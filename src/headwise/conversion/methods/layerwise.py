"""The conversion itself: down the layers, original and result side by side on the same text.

A layer is read, its original run on what the original's layers before it gave, the new one made
for what the new layers before it give, and its output projection fitted so that the sum comes as
near as it can to the original's; then it is written, and both proceed to the next. So errors do not
add up unseen, and no more than two layers are in memory at a time.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headwise.base.progress import Progress
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.weights import ShardWriter, in_attention, layer_prefix
from headwise.conversion.methods.decoder import StreamedDecoder, attend, feed_forward, filled
from headwise.conversion.methods.method import Method
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.refit import Refit
from headwise.conversion.methods.sensitivity import Sensitivity
from headwise.conversion.methods.statistics import LayerStatistics, Moments
from headwise.errors import ConversionError
from headwise.spec import AttentionSpec

# Sequences that go through a layer together.
_BATCH = 2
# Tokens of a sequence whose attention weights are looked at: all pairs of them are in memory.
_SENSED = 1024


class LayerwiseConversion:
    """Converts the layers of a model one after the other.

    `aware`: the method is told what the text says, and output projections are fitted.
    """

    def __init__(
        self, decoder: StreamedDecoder, spec: AttentionSpec, method: Method, *, aware: bool
    ) -> None:
        self.decoder, self.spec, self.method, self.aware = decoder, spec, method, aware

    def write(
        self, text: Calibration | None, writer: ShardWriter, progress: Progress
    ) -> list[float]:
        """Write all weights of the result; what each layer's attention loses.

        Returns:
            per layer, after its attention, the squared error of the hidden states over their
            square, each scaled as the norm that follows scales it, on text that nothing was fitted
            to; empty without text.
        """
        errors: list[float] = []
        layers = self.decoder.config.num_hidden_layers
        with torch.inference_mode():
            states = None if text is None else _HiddenStates(self.decoder, text, fit=self.aware)
            for index in range(layers):
                progress("converting layers", index, layers)
                old = self.decoder.layer(index)
                projections = Projections.of(
                    old.self_attn.state_dict(), self.spec.heads, self.spec.kv_heads
                )
                statistics = None
                if states is not None:
                    states.run_old(old)
                    states.require_finite(index)
                    if self.aware:
                        statistics = states.statistics(old, projections, self.spec.scale)
                attention = self.method.convert(index, projections, statistics)
                tensors = old.state_dict()
                tensors |= {f"self_attn.{name}": tensor for name, tensor in attention.items()}
                new = filled(self.method.layer_class, self.method.config, index, tensors)
                if states is not None:
                    errors.append(states.run_new(new, refit=self.aware))
                self._write_layer(index, new, writer)
        for name, tensor in self.decoder.weights.outside_layers():
            writer.add(name, tensor)
        progress("converting layers", layers, layers)
        return errors

    def _write_layer(self, index: int, layer: Any, writer: ShardWriter) -> None:
        weights, prefix = self.decoder.weights, layer_prefix(index)
        dtype = weights.attention_dtype(index)
        for name, tensor in layer.state_dict().items():
            if not in_attention(prefix + name):
                tensor = weights[prefix + name]
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            writer.add(prefix + name, tensor)


class _HiddenStates:
    """Hidden states of both models on all batches; `middle`, the original's after attention.

    Each stays in its own memory from layer to layer: buffers of this size that come and go leave
    gaps that the process does not give back.
    """

    def __init__(self, decoder: StreamedDecoder, text: Calibration, *, fit: bool) -> None:
        fitted = text.fitted.split(_BATCH) if fit else ()
        self.decoder, self.fitted = decoder, len(fitted)
        self.old = [decoder.embed(batch) for batch in (*fitted, *text.probed.split(_BATCH))]
        self.new = [hidden.clone() for hidden in self.old]
        self.middle = [torch.empty_like(hidden) for hidden in self.old]
        self.heads: list[Tensor] = []  # the new layer's, [B,S,H*V]; their size is known then
        self.positions = decoder.positions(self.old[0])
        self.eps = float(decoder.config.rms_norm_eps)

    def run_old(self, layer: Any) -> None:
        """The original's layer."""
        for hidden, middle in zip(self.old, self.middle, strict=True):
            torch.add(hidden, attend(layer, hidden, self.positions)[1], out=middle)
            hidden.copy_(feed_forward(layer, middle))

    def require_finite(self, index: int) -> None:
        """Raise ConversionError where the hidden states are not numbers."""
        if not all(bool(hidden.isfinite().all()) for hidden in (*self.middle, *self.new)):
            raise ConversionError(
                f"layer {index}: hidden states are not finite on the calibration text; the "
                "model's weights are damaged"
            )

    def statistics(self, layer: Any, projections: Projections, scale: float) -> LayerStatistics:
        """What the new layer will meet."""
        moments = Moments(self.new[0].shape[-1])
        for hidden in self.new[: self.fitted]:
            moments.add(layer.input_layernorm(hidden))
        # a query at the end of a sequence meets every distance, one at its start only short ones
        distances = torch.arange(self.new[0].shape[1], 0, -1, dtype=torch.float32)
        return LayerStatistics(
            moments=moments,
            sensitivity=self._sensitivity(layer, projections, scale),
            frequencies=self.decoder.frequencies,
            distances=distances / distances.sum(),
            rotary_scale=self.decoder.rotary_scale,
        )

    def _sensitivity(self, layer: Any, projections: Projections, scale: float) -> Sensitivity:
        inputs = layer.input_layernorm(self.new[0][:, :_SENSED])
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        query, key, value = (
            (inputs @ weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)
            for weight, heads in (
                (projections.query, projections.heads),
                (projections.key, projections.kv_heads),
                (projections.value, projections.kv_heads),
            )
        )
        cos, sin = (table[:, :_SENSED] for table in self.positions)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return Sensitivity.measure(query, key, value, projections.output, scale)

    def run_new(self, layer: Any, *, refit: bool) -> float:
        """The new layer, its output projection fitted; its error on what was not fitted to.

        It is fitted to what brings the hidden states back to the original's, errors of the layers
        before it included; each token counts by the inverse square of its hidden state, as the norm
        that follows divides by it.
        """
        projection = layer.self_attn.o_proj
        if not self.heads:
            self.heads = [
                hidden.new_empty(*hidden.shape[:2], projection.in_features) for hidden in self.new
            ]
        for hidden, heads in zip(self.new, self.heads, strict=True):
            heads.copy_(attend(layer, hidden, self.positions)[0])
        if refit:
            self._refit(projection)
        errors = []
        for index, (hidden, heads) in enumerate(zip(self.new, self.heads, strict=True)):
            middle = hidden + projection(heads)
            if index >= self.fitted:
                wanted = self.middle[index]
                error = middle / self._size(middle) - wanted / self._size(wanted)
                errors.append(error.square().mean())
            hidden.copy_(feed_forward(layer, middle))
        return float(torch.stack(errors).mean())

    def _refit(self, projection: Any) -> None:
        sums = Refit(*projection.weight.T.shape)
        batches = zip(self.middle[: self.fitted], self.new, self.heads)
        for middle, hidden, heads in batches:
            wanted = middle - hidden
            if projection.bias is not None:
                wanted = wanted - projection.bias
            size = self._size(middle)
            sums.add(heads / size, wanted / size)
        projection.weight.copy_(sums.solve(projection.weight))

    def _size(self, hidden: Tensor) -> Tensor:
        """What the norm that follows divides hidden states [.., E] by, [.., 1]."""
        return (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt()

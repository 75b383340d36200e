"""The conversion itself: down the layers, original and result side by side on the same text.

A layer is read, its original run on what the original's layers before it gave, the new one made
for what the new layers before it give, and its output projection fitted so that the sum comes as
near as it can to the original's; then it is written, and both proceed to the next. So errors do not
add up unseen, and no more than two layers are in memory at a time.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.base.progress import Progress
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.companions import copy_companions
from headwise.conversion.checkpoint.weights import in_attention, layer_prefix, write_weights
from headwise.conversion.methods.decoder import StreamedDecoder, attend, feed_forward, filled
from headwise.conversion.methods.expansion import expand
from headwise.conversion.methods.latent import latent
from headwise.conversion.methods.merging import merging
from headwise.conversion.methods.method import Method
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.refit import Refit
from headwise.conversion.methods.statistics import LayerStatistics, Moments, Sensitivity
from headwise.conversion.request import ConversionRequest
from headwise.errors import ConversionError
from headwise.hf.stock_names import apply_rotary_pos_emb

# Sequences that go through a layer together.
_BATCH = 2
# Tokens of a sequence whose attention weights are looked at: all pairs of them are in memory.
_SENSED = 1024


def write_converted(
    original: Checkpoint,
    request: ConversionRequest,
    text: Calibration | None,
    part: Path,
    progress: Progress,
) -> list[float]:
    """Convert a checkpoint into the empty folder `part`, layer by layer.

    Args:
        text: to fit to and to measure errors with; not read where the target is exact.

    Returns:
        per layer, after its attention, the squared error of the hidden states over their square,
        each scaled as the norm that follows scales it, on text that nothing was fitted to; empty
        without text, or where the target is exact.

    Raises:
        ConversionError: the model cannot be converted so.
    """
    target = request.target
    states: _HiddenStates | None = None
    if target.mechanism == "mha":
        expand(original, part, progress)
    else:
        decoder = StreamedDecoder(original)
        if target.kv_heads is not None:
            method = merging(original, target.kv_heads, decoder.layer_class)
        else:
            method = latent(original, target)
        if text is not None and not target.exact:
            states = _HiddenStates(decoder, text, naive=request.method == "naive")
        write_weights(part, _converted(original, decoder, method, states, progress))
        method.config.save_pretrained(part)
    copy_companions(original.folder, part)
    return [] if states is None else states.errors


@torch.inference_mode()
def _converted(
    original: Checkpoint,
    decoder: StreamedDecoder,
    method: Method,
    states: "_HiddenStates | None",
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """The result's weights by name, a layer at a time.

    The new attention has the dtype of the stored one; the rest is as it is stored.
    """
    spec, weights = original.attention, original.weights
    layers = original.config.num_hidden_layers
    for index in range(layers):
        progress("converting layers", index, layers)
        old = decoder.layer(index)
        tensors = old.state_dict()
        projections = Projections.of(old.self_attn.state_dict(), spec.heads, spec.kv_heads)
        statistics = None if states is None else states.run_old(index, old)
        made = method.convert(index, projections, statistics)
        tensors |= {f"self_attn.{name}": tensor for name, tensor in made.items()}
        new = filled(method.layer_class, method.config, index, tensors)
        if states is not None:
            states.run_new(new)
        prefix, dtype = layer_prefix(index), weights.attention_dtype(index)
        for name, tensor in new.state_dict().items():
            if not in_attention(prefix + name):
                tensor = weights[prefix + name]
            elif tensor.is_floating_point():
                tensor = tensor.to(dtype)
            yield prefix + name, tensor
    yield from weights.outside_layers()
    progress("converting layers", layers, layers)


class _HiddenStates:
    """Hidden states of both models on all batches; `middle`, the original's after attention.

    `errors` has one for each layer that was run.

    Each stays in its own memory from layer to layer: buffers of this size that come and go leave
    gaps that the process does not give back.

    `naive`: the method is not told what the text says, and no output projection is fitted.
    """

    @torch.inference_mode()
    def __init__(self, decoder: StreamedDecoder, text: Calibration, *, naive: bool) -> None:
        fitted = () if naive else text.fitted.split(_BATCH)
        self.decoder, self.naive, self.fitted = decoder, naive, len(fitted)
        self.old = [decoder.embed(batch) for batch in (*fitted, *text.probed.split(_BATCH))]
        self.new = [hidden.clone() for hidden in self.old]
        self.middle = [torch.empty_like(hidden) for hidden in self.old]
        self.errors: list[float] = []
        self.heads: list[Tensor] = []  # the new layer's, [B,S,H*V]; their size is known then
        index = torch.arange(self.old[0].shape[1])[None]
        self.positions = decoder.rotary(self.old[0], position_ids=index)  # cos and sin, [1, S, D]
        self.eps = float(decoder.config.rms_norm_eps)

    def run_old(self, index: int, layer: Any) -> LayerStatistics | None:
        """Run the original's layer; what the new one will meet, where the method is told.

        Raises:
            ConversionError: hidden states that are not numbers.
        """
        for hidden, middle in zip(self.old, self.middle, strict=True):
            torch.add(hidden, attend(layer, hidden, self.positions)[1], out=middle)
            hidden.copy_(feed_forward(layer, middle))
        if not all(bool(hidden.isfinite().all()) for hidden in (*self.middle, *self.new)):
            raise ConversionError(
                f"layer {index}: hidden states are not finite on the calibration text; the "
                "model's weights are damaged"
            )
        if self.naive:
            return None
        moments = Moments(self.new[0].shape[-1])
        for hidden in self.new[: self.fitted]:
            moments.add(layer.input_layernorm(hidden))
        # a query at the end of a sequence meets every distance, one at its start only short ones
        distances = torch.arange(self.new[0].shape[1], 0, -1, dtype=torch.float32)
        return LayerStatistics(
            moments=moments,
            sensitivity=self._sensitivity(layer),
            frequencies=self.decoder.rotary.inv_freq,
            distances=distances / distances.sum(),
            rotary_scale=self.decoder.rotary.attention_scaling,
        )

    def _sensitivity(self, layer: Any) -> Sensitivity:
        attention, inputs = layer.self_attn, layer.input_layernorm(self.new[0][:, :_SENSED])
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (table[:, :_SENSED] for table in self.positions)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        output = attention.o_proj.weight
        return Sensitivity.measure(query, key, value, output, attention.scaling)

    def run_new(self, layer: Any) -> None:
        """Run the new layer, its output projection fitted; note its error on what was not fitted.

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
        if not self.naive:
            self._refit(projection)
        errors = []
        for index, (hidden, heads) in enumerate(zip(self.new, self.heads, strict=True)):
            middle = hidden + projection(heads)
            if index >= self.fitted:
                wanted = self.middle[index]
                error = middle / self._size(middle) - wanted / self._size(wanted)
                errors.append(error.square().mean())
            hidden.copy_(feed_forward(layer, middle))
        self.errors.append(float(torch.stack(errors).mean()))

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

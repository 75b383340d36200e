"""The conversion itself: down the layers, original and result side by side on the same text.

A layer is read, its original run on what the original's layers before it gave, the new one made
for what the new layers before it give, and its output projection fitted so that the sum comes as
near as it can to the original's; then it is written, and both go on to the next. So errors do not
add up unseen, and no more than two layers are in memory at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwise.base.progress import Progress
from headwise.conversion.checkpoint.weights import ShardWriter
from headwise.conversion.methods.decoder import PREFIX, Stack, attend, feed_forward, filled
from headwise.conversion.methods.method import Method, Seen, attention_tensors
from headwise.conversion.methods.projections import Moments, Projections
from headwise.conversion.methods.refit import Refit
from headwise.conversion.methods.sensitivity import Sensitivity
from headwise.errors import ConversionError
from headwise.spec import AttentionSpec

_ATTENTION = "self_attn."
# Tokens of a sequence whose attention weights are looked at: all pairs of them are in memory.
_SENSED = 1024


@dataclass(frozen=True)
class Text:
    """Token sequences [n, S] of the calibration text: to fit on, and to see the errors with."""

    fitted: list[Tensor]
    probed: list[Tensor]

    @property
    def batches(self) -> list[Tensor]:
        """All of them, those to fit on first."""
        return [*self.fitted, *self.probed]


class Walk:
    """Goes through the layers of a model, in pairs of the original and the new one.

    `aware`: the method is told what the text says, and output projections are fitted.
    """

    def __init__(self, stack: Stack, spec: AttentionSpec, method: Method, *, aware: bool) -> None:
        self.stack, self.spec, self.method, self.aware = stack, spec, method, aware

    def convert(self, text: Text | None, writer: ShardWriter, progress: Progress) -> list[float]:
        """Write all weights of the result; what each layer's attention loses.

        Returns:
            per layer, after its attention, the squared error of the hidden states over their
            square, each scaled as the norm that follows scales it, on text that nothing was fitted
            to; empty without text.
        """
        errors: list[float] = []
        layers = self.stack.config.num_hidden_layers
        with torch.inference_mode():
            states = None if text is None else _States(self.stack, text)
            for index in range(layers):
                progress("converting layers", index, layers)
                old = self.stack.layer(index)
                projections = self.projections(old)
                if states is None:
                    new = self._new_layer(index, old, projections, None)
                else:
                    states.run_old(old)
                    states.require_finite(index)
                    scale = self.spec.scale
                    seen = states.seen(old, projections, scale) if self.aware else None
                    new = self._new_layer(index, old, projections, seen)
                    errors.append(states.run_new(new, refit=self.aware))
                self._write(index, new, writer)
        for name in self.stack.weights:
            if not name.startswith(PREFIX.partition("{")[0]):
                writer.add(name, self.stack.weights[name])
        progress("converting layers", layers, layers)
        return errors

    def projections(self, layer: Any) -> Projections:
        """Those of an original layer."""
        tensors = attention_tensors(layer.state_dict())
        return Projections.of(tensors, self.spec.heads, self.spec.kv_heads)

    def _new_layer(self, index: int, old: Any, projections: Projections, seen: Seen | None) -> Any:
        tensors = dict(old.state_dict())
        kept = {name: at for name, at in tensors.items() if not name.startswith(_ATTENTION)}
        kept |= {name: tensors[name] for name in ("self_attn.o_proj.bias",) if name in tensors}
        made = self.method.convert(index, projections, seen)
        kept |= {f"{_ATTENTION}{name}": tensor for name, tensor in made.items()}
        return filled(self.method.layer_class, self.method.config, index, kept)

    def _write(self, index: int, layer: Any, writer: ShardWriter) -> None:
        prefix = PREFIX.format(index)
        stored = self.stack.weights[f"{prefix}{_ATTENTION}q_proj.weight"].dtype
        for name, tensor in layer.state_dict().items():
            if name.startswith(_ATTENTION):
                kept = tensor.to(stored) if tensor.is_floating_point() else tensor
            else:
                kept = self.stack.weights[prefix + name]
            writer.add(prefix + name, kept)


class _States:
    """Hidden states of both models on all batches; `middle`, the original's after attention.

    Each stays in its own memory from layer to layer: buffers of this size that come and go leave
    gaps that the process does not give back.
    """

    def __init__(self, stack: Stack, text: Text) -> None:
        self.stack, self.fitted = stack, len(text.fitted)
        self.old = [stack.embed(batch) for batch in text.batches]
        self.new = [hidden.clone() for hidden in self.old]
        self.middle = [torch.empty_like(hidden) for hidden in self.old]
        self.heads: list[Tensor] = []  # the new layer's, [B,S,H*V]; their size is known then
        self.positions = stack.positions(self.old[0])
        self.eps = float(stack.config.rms_norm_eps)

    def run_old(self, layer: Any) -> None:
        """The original's layer."""
        for hidden, middle in zip(self.old, self.middle, strict=True):
            torch.add(hidden, attend(layer, hidden, self.positions)[1], out=middle)
            hidden.copy_(feed_forward(layer, middle))

    def require_finite(self, index: int) -> None:
        """Raise ConversionError where the hidden states are not numbers."""
        if not all(bool(at.isfinite().all()) for at in (*self.middle, *self.new)):
            raise ConversionError(
                f"layer {index}: hidden states are not finite on the calibration text; the "
                "model's weights are damaged"
            )

    def seen(self, layer: Any, projections: Projections, scale: float) -> Seen:
        """What the new layer will see."""
        moments = Moments(self.new[0].shape[-1])
        for hidden in self.new[: self.fitted]:
            moments.add(layer.input_layernorm(hidden))
        return Seen(
            moments=moments,
            sensitivity=self._sensitivity(layer, projections, scale),
            frequencies=self.stack.frequencies,
            length=self.new[0].shape[1],
            rotary_scale=self.stack.rotary_scale,
        )

    def _sensitivity(self, layer: Any, projections: Projections, scale: float) -> Sensitivity:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

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
        query, key = apply_rotary_pos_emb(query, key, *(at[:, :_SENSED] for at in self.positions))
        return Sensitivity.measure(query, key, value, projections.output, scale)

    def run_new(self, layer: Any, *, refit: bool) -> float:
        """The new layer, its output projection fitted; its error on what was not fitted to.

        It is fitted to what brings the hidden states back to the original's, errors of the layers
        before it included; each token counts by the inverse square of its hidden state, as the norm
        that follows divides by it.
        """
        projection = layer.self_attn.o_proj
        if not self.heads:
            self.heads = [at.new_empty(*at.shape[:2], projection.in_features) for at in self.new]
        for hidden, z in zip(self.new, self.heads, strict=True):
            z.copy_(attend(layer, hidden, self.positions)[0])
        if refit:
            sums = Refit(*projection.weight.T.shape)
            for at in range(self.fitted):
                wanted = self.middle[at] - self.new[at]
                if projection.bias is not None:
                    wanted = wanted - projection.bias
                size = self._size(self.middle[at])
                sums.add(self.heads[at] / size, wanted / size)
            projection.weight.copy_(sums.solve(projection.weight))
        errors = []
        for at, z in enumerate(self.heads):
            hidden = self.new[at] + projection(z)
            if at >= self.fitted:
                middle = self.middle[at] / self._size(self.middle[at])
                errors.append((hidden / self._size(hidden) - middle).square().mean())
            self.new[at].copy_(feed_forward(layer, hidden))
        return float(torch.stack(errors).mean())

    def _size(self, hidden: Tensor) -> Tensor:
        """What the norm that follows divides hidden states [.., E] by, [.., 1]."""
        return (hidden.square().mean(-1, keepdim=True) + self.eps).sqrt()

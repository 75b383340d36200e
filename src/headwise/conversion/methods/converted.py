"""A converted checkpoint, written by the method that its target asks for."""

from pathlib import Path

from headwise.base.progress import Progress, silent
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.companions import copy_companions
from headwise.conversion.checkpoint.weights import ShardWriter
from headwise.conversion.methods.decoder import StreamedDecoder
from headwise.conversion.methods.expansion import expand
from headwise.conversion.methods.latent import LatentMethod
from headwise.conversion.methods.layerwise import LayerwiseConversion
from headwise.conversion.methods.merging import MergingMethod
from headwise.conversion.target import Target
from headwise.spec import AttentionSpec


def write_converted(
    original: Checkpoint,
    spec: AttentionSpec,
    target: Target,
    text: Calibration | None,
    part: Path,
    *,
    naive: bool,
    progress: Progress = silent,
) -> list[float]:
    """Convert a checkpoint into the empty folder `part`, layer by layer.

    Args:
        spec: the attention of its layers, as `coverage.check` gives it.
        text: to fit to and to measure errors with; not read where the target is exact.

    Returns:
        what each layer loses, as `LayerwiseConversion.write` gives it; empty without text.

    Raises:
        ConversionError: the model cannot be converted so.
    """
    errors: list[float] = []
    if target.mechanism == "mha":
        expand(original, part, progress)
    else:
        decoder, method = StreamedDecoder(original), None
        if target.kv_heads is not None:
            method = MergingMethod(original.config, target.kv_heads, decoder.layer_class)
        conversion = LayerwiseConversion(
            decoder, spec, method or LatentMethod(original, spec, target), aware=not naive
        )
        writer = ShardWriter(part)
        errors = conversion.write(None if target.exact else text, writer, progress)
        writer.close()
        conversion.method.config.save_pretrained(part)
    copy_companions(original.folder, part)
    return errors

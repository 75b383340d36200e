"""`convert`: a checkpoint with a cheaper attention mechanism, and what that costs."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from headwise.base.files import local_path, one_line
from headwise.base.folders import written_whole
from headwise.base.memory import gib
from headwise.base.progress import Progress, silent
from headwise.base.written import as_json, write_whole
from headwise.conversion.calibration import Sequences
from headwise.conversion.checkpoint.companions import companions
from headwise.conversion.checkpoint.companions import copy_companions as _copy_companions
from headwise.conversion.checkpoint.weights import ShardWriter, Weights, in_attention
from headwise.conversion.checkpoint.workspace import Work, file_digest, model_state
from headwise.conversion.coverage import check, check_head, check_length
from headwise.conversion.methods.decoder import Stack
from headwise.conversion.methods.expansion import expand
from headwise.conversion.methods.latent_sizes import even_sizes
from headwise.conversion.methods.layerwise import Text, Walk
from headwise.conversion.methods.method import Latent, Merge, Method
from headwise.conversion.request import check_options
from headwise.conversion.target import Target
from headwise.conversion.tuning.distillation import Tuning
from headwise.conversion.tuning.distillation import tune as distil
from headwise.conversion.verdict.card import model_card
from headwise.conversion.verdict.quality import Judge
from headwise.conversion.verdict.speed import Speeds, compare_speed
from headwise.conversion.verdict.verdict import CacheCost, Verdict
from headwise.errors import (
    CapacityError,
    ConversionError,
    HeadwiseError,
    LoadError,
    OptionError,
)
from headwise.loading.load import load_config, load_model, load_tokenizer, model_folder
from headwise.loading.memory import weight_bytes
from headwise.loading.source import Source, find_source
from headwise.spec import AttentionSpec

# How often a tuning is kept.
_SAVE_SECONDS = 120.0
# Sequences that go through a layer together.
_BATCH = 2
# A folder is as large as its weights; this much more is its vocabulary and configs.
_SLACK_BYTES = 64 * 2**20


def convert(
    model: str | Path,
    to: str,
    *,
    out: str | Path,
    calibration: str | Path | None = None,
    method: str = "aware",
    tokens: int = 16384,
    length: int = 512,
    tune: int = 0,
    verdict: bool = True,
    command: str | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Move a checkpoint to a cheaper attention mechanism, and measure what that costs.

    Example:
        >>> import headwise
        >>> verdict = headwise.convert(
        ...     "meta-llama/Llama-3.2-1B", "mla:50%", calibration="text.txt", out="llama-mla"
        ... )  # doctest: +SKIP
        >>> print(verdict.conclusion)  # doctest: +SKIP

    Args:
        model: a folder, a .gguf file or a hub id of a Llama, Mistral or Qwen2 with MHA or GQA; for
            "mha" of a DeepSeek-V2, a DeepSeek-V3 or what "mla" made.
        to: "gqa:2" (2 kv heads), "mqa", "mla" (everything kept, exact), "mla:50%" (of the cached
            elements) or "mla:rank=128,rope=64" (R and P of every layer); from MLA, "mha" (exact).
        out: a new folder for the checkpoint, its model card README.md and headwise-verdict.json.
            It appears whole; then the verdict is measured and added to both files.
        calibration: a text file, like what the model will read. Its end is held out for the
            verdict. Only "mla" and "mha" do without one.
        method: "aware" of the activations, or "naive": mean pooling of heads, or the singular value
            decomposition of the weights, to compare with.
        tokens: of the text, to fit on.
        length: tokens of a sequence.
        tune: steps of distillation from the original after the conversion. An interrupted call
            goes on when it is made again: until `out` is written, a hidden folder .NAME.work beside
            it keeps what is done.
        verdict: whether to measure quality and speed, which can take longer than the conversion.
        command: what the card says to repeat this; by default the call.
        progress: called as progress(stage, done, total).

    Returns:
        cache, quality, layer errors and speed, before and after.

    Raises:
        ConversionError: the model cannot be converted so, or what it became gives no numbers.
        OptionError: an option out of its range, or a text that is too short.
        LoadError: no such model or file, or `out` cannot be written.
        CapacityError: it would not fit in memory or on the disk.
    """
    began = time.monotonic()
    target = Target.parse(to)
    folder_out = _resolved(out)
    file = None if calibration is None else local_path(calibration)
    check_options(
        target,
        calibration=file,
        out=folder_out,
        method=method,
        tokens=tokens,
        length=length,
        tune=tune,
    )
    report = progress if progress is not None else silent
    source = find_source(model)
    folder = model_folder(model, progress=report)
    config = load_config(folder)
    check(config, target)
    check_head(Weights(folder), config)
    companions(folder)  # raises what must not be copied
    text = None
    if file is not None:
        check_length(config, length)
        text = Sequences.read(file, load_tokenizer(folder), tokens, length)
        if int(text.largest) >= config.vocab_size:
            raise LoadError(
                f"{folder}: its tokenizer gives token {int(text.largest)}, and the model has "
                f"{config.vocab_size}: they are not of one model"
            )
    _check_disk(folder, folder_out, copies=5 if tune else 1)
    naive = method == "naive"

    def make(part: Path) -> list[float]:
        return write_converted(folder, target, text, part, naive=naive, progress=report)

    asked: dict[str, Any] = {"model": model_state(folder), "to": str(target), "method": method}
    asked |= {"tokens": tokens, "length": length, "text": file and file_digest(file)}
    work = Work(folder_out, asked)
    with _written(folder_out) as part:
        if not tune or text is None:
            before, errors = None, make(part)
        else:
            before, errors = work.converted(make)
            _tune(folder, before, part, text, tune, work, report)
        made = load_config(part)
        found = Verdict(
            model=source.name,
            model_type=made.model_type,
            base_model=source.place if source.kind == "hub" else None,
            target=str(target),
            method=method,
            cache=CacheCost.between(config, made),
            speeds=Speeds(note="decode speed was not measured"),
            command=command or _call(source, to, calibration, out, method, tokens, length, tune),
            seconds=time.monotonic() - began,
            layer_errors=tuple(errors),
        )
        _write(found, part)
    try:
        if verdict:
            found = _measured(found, folder, before, folder_out, text, report)
            found = replace(found, seconds=time.monotonic() - began)
            _write(found, folder_out)
    finally:
        work.remove()
    return found


def _write(verdict: Verdict, folder: Path) -> None:
    """The model card, and the verdict as JSON: two files, each replaced in one step."""
    write_whole(folder / "README.md", model_card(verdict).encode())
    write_whole(folder / "headwise-verdict.json", as_json(verdict.to_dict(), indent=1).encode())


def _measured(
    verdict: Verdict,
    folder: Path,
    before: Path | None,
    out: Path,
    text: Sequences | None,
    progress: Progress,
) -> Verdict:
    """The verdict with quality, where there is a text, and speed. `before`: what was tuned."""
    if text is not None:
        try:
            verdict = replace(verdict, **_judged(folder, before, out, text, progress))
        except ConversionError:  # no numbers: this is no checkpoint
            shutil.rmtree(out)
            raise
    return replace(verdict, speeds=_speeds(folder, out, progress))


def _resolved(out: str | Path) -> Path:
    """The result's folder by its real name."""
    if not isinstance(out, Path) and not out:
        raise OptionError("out is empty, expected the name of a new folder")
    with one_line(f"out is {out}", kind=OptionError):
        return local_path(out, kind=OptionError).resolve()


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """`written_whole`, whose errors are one line."""
    try:
        with written_whole(out) as part:
            yield part
    except HeadwiseError:
        raise
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{out} cannot be written: {error}") from error


def _speeds(folder: Path, converted: Path, progress: Progress) -> Speeds:
    """Decoding before and after; that it cannot be measured is no reason to lose the result."""
    try:
        return compare_speed(folder, converted, progress=progress)
    except (HeadwiseError, RuntimeError) as error:
        reason = " ".join(str(error).replace(f"{folder.parent}/", "").split())[:300]
        return Speeds(note=f"decode speed was not measured: {reason}")


def write_converted(
    folder: Path,
    target: Target,
    text: Sequences | None,
    part: Path,
    *,
    naive: bool,
    progress: Progress = silent,
) -> list[float]:
    """Convert the checkpoint in `folder` into the empty folder `part`, layer by layer.

    Returns:
        what each layer loses, as `Walk.convert` gives it; empty without text.

    Raises:
        ConversionError: the model cannot be converted so.
    """
    config = load_config(folder)
    spec = check(config, target)
    if target.mechanism == "mha":
        expand(folder, part, progress)
        _copy_companions(folder, part)
        return []
    stack = Stack(folder, config)
    made = _method(stack, spec, target, naive=naive)
    writer = ShardWriter(part)
    batches = None
    if text is not None and not target.exact:
        fitted = [] if naive else list(text.fitted.split(_BATCH))
        batches = Text(fitted, list(text.probed.split(_BATCH)))
    errors = Walk(stack, spec, made, aware=not naive).convert(batches, writer, progress)
    writer.close()
    made.config.save_pretrained(part)
    _copy_companions(folder, part)
    return errors


def _method(stack: Stack, spec: AttentionSpec, target: Target, *, naive: bool) -> Method:
    if target.mechanism == "gqa":
        return Merge(stack.config, target.kv_heads or 1, stack.layer_class, naive=naive)
    biased = "model.layers.0.self_attn.k_proj.bias" in stack.weights
    sizes = even_sizes(spec, target, stack.config.num_hidden_layers)
    return Latent(stack.config, spec, sizes, biased=biased, naive=naive)


def _judged(
    folder: Path, before: Path | None, out: Path, text: Sequences, progress: Progress
) -> dict[str, Any]:
    """The verdict's fields about quality; one model in memory at a time."""
    original = _loaded(folder, "auto", progress)
    judge = Judge(original, load_tokenizer(folder), text.held_out, progress)
    del original
    fields: dict[str, Any] = {
        name: getattr(judge, name) for name in ("prompt", "positions", "original")
    }
    fields["converted"] = judge.judge(_loaded(before or out, "auto", progress))
    if before is not None:
        fields["tuned"] = judge.judge(_loaded(out, "auto", progress), "tuned")
    return fields


def _tune(
    folder: Path,
    converted: Path,
    part: Path,
    text: Sequences,
    steps: int,
    work: Work,
    progress: Progress,
) -> None:
    """Tune the converted model into `part`."""
    teacher = _loaded(folder, "auto", progress)
    student = _loaded(converted, "float32", progress)
    distil(
        teacher,
        student,
        text.tuned,
        Tuning(steps),
        kept=work.tuning,
        save_seconds=_SAVE_SECONDS,
        progress=progress,
    )
    stored, new = Weights(converted), student.state_dict()
    writer = ShardWriter(part)
    for name in stored:
        tensor = stored[name]
        writer.add(name, new[name].to(tensor.dtype) if in_attention(name) else tensor)
    writer.close()
    work.copy_to(part)


def _loaded(folder: Path, dtype: str, progress: Progress) -> Any:
    return load_model(folder, load_config(folder), dtype=dtype, progress=progress)


def _check_disk(folder: Path, out: Path, copies: int) -> None:
    """`copies` of the weights: the result, and for a tuning what it goes on from."""
    needed = copies * weight_bytes(folder, None) + _SLACK_BYTES
    place = next(at for at in out.parents if at.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise CapacityError(
            f"converting needs {gib(needed)} of disk but {place} has {gib(free)} free; make room "
            "or give --out on another disk"
        )


def _call(source: Source, to: str, calibration: Any, out: Any, *rest: object) -> str:
    """The call, for the card: what is on this machine goes by its name, not its place."""
    given = [None if calibration is None else Path(calibration).name, Path(out).name, *rest]
    names = ("calibration", "out", "method", "tokens", "length", "tune")
    options = ", ".join(f"{name}={value!r}" for name, value in zip(names, given, strict=True))
    model = source.place if source.kind == "hub" else Path(source.place).name
    return f"headwise.convert({model!r}, {to!r}, {options})"

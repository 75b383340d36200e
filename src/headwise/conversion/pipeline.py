"""`convert`: a checkpoint with a cheaper attention mechanism, and what that costs."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from headwise.base.files import local_path, one_line
from headwise.base.progress import Progress, silent
from headwise.base.written import as_json, write_whole, written_whole
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.companions import companions
from headwise.conversion.checkpoint.workspace import Workspace
from headwise.conversion.coverage import check, check_head, check_length
from headwise.conversion.methods.layerwise import write_converted
from headwise.conversion.request import ConversionRequest
from headwise.conversion.target import Target
from headwise.conversion.tuning.distillation import write_tuned
from headwise.conversion.verdict.card import model_card
from headwise.conversion.verdict.quality import judged
from headwise.conversion.verdict.speed import Speeds, timed
from headwise.conversion.verdict.verdict import CacheCost, Verdict
from headwise.errors import ConversionError, LoadError, OptionError
from headwise.loading.model_folder import model_folder
from headwise.loading.source import find_source


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
            It appears atomically; then the verdict is measured and added to both files.
        calibration: a text file, like what the model will read. Its end is held out for the
            verdict. Only "mla" and "mha" do without one.
        method: "aware" of the activations, or "naive": mean pooling of heads, or the singular value
            decomposition of the weights, to compare with.
        tokens: how many tokens of the text are fitted to.
        length: tokens per sequence.
        tune: steps of distillation from the original after the conversion. An interrupted call
            resumes when it is made again: until `out` is written, a hidden folder .NAME.work beside
            it keeps what is done.
        verdict: whether to measure quality and speed, which can take longer than the conversion.
        command: what the card says to repeat this; by default the call.
        progress: called as progress(stage, done, total).

    Returns:
        cache, quality, layer errors and speed, before and after.

    Raises:
        ConversionError: the model cannot be converted so, or the result gives no numbers.
        OptionError: an option out of its range, or a text that is too short.
        LoadError: no such model or file, or `out` cannot be written.
        CapacityError: it would not fit in memory or on the disk.
    """
    began = time.monotonic()
    request = ConversionRequest(
        target=Target.parse(to),
        out=_resolved(out),
        calibration=None if calibration is None else local_path(calibration),
        method=method,
        tokens=tokens,
        length=length,
        tune=tune,
    )
    report = progress if progress is not None else silent
    source = find_source(model)
    original = Checkpoint(model_folder(model, progress=report))
    check(original.config, request.target)
    check_head(original.weights, original.config)
    companions(original.folder)  # raises what must not be copied
    text = _calibration(original, request)
    request.check_disk(original.folder)

    def write(part: Path) -> list[float]:
        return write_converted(original, request, text, part, report)

    workspace = Workspace(request.out, request.identity(original.folder))
    faults = (OSError, SafetensorError)
    with (
        one_line(f"{request.out} cannot be written", faults=faults),
        written_whole(request.out) as part,
    ):
        if tune and text is not None:
            errors = workspace.convert(write)
            write_tuned(original, workspace, text.tuned, tune, part, report)
        else:
            errors = write(part)
        config = Checkpoint(part).config
        made = Verdict(
            model=source.name,
            model_type=config.model_type,
            base_model=source.place if source.kind == "hub" else None,
            target=str(request.target),
            method=method,
            cache=CacheCost.between(original.config, config),
            speeds=Speeds(note="decode speed was not measured"),
            command=command or request.call(source),
            seconds=time.monotonic() - began,
            layer_errors=tuple(errors),
        )
        _write(made, part)
    try:
        if verdict:
            result = Checkpoint(request.out)
            if text is not None:
                results = {"converted": result}
                if tune:
                    results = {"converted": workspace.converted, "tuned": result}
                made = replace(made, **judged(original, results, text.held_out, report))
            speeds = timed(original, result, report)
            made = replace(made, speeds=speeds, seconds=time.monotonic() - began)
            _write(made, request.out)
    except ConversionError:  # no numbers: this is no checkpoint
        shutil.rmtree(request.out)
        raise
    finally:
        workspace.remove()
    return made


def _calibration(original: Checkpoint, request: ConversionRequest) -> Calibration | None:
    """The text of the request, as tokens of the original; None where it names none."""
    if request.calibration is None:
        return None
    check_length(original.config, request.length)
    text = Calibration.read(request.calibration, original.tokenizer, request.tokens, request.length)
    largest = max(int(text.tuned.max()), int(text.held_out.max()))
    if largest >= original.config.vocab_size:
        raise LoadError(
            f"{original.folder}: its tokenizer gives token {largest}, and the model has "
            f"{original.config.vocab_size}: they are not of one model"
        )
    return text


def _write(verdict: Verdict, folder: Path) -> None:
    """The model card, and the verdict as JSON: two files, each replaced in one step."""
    write_whole(folder / "README.md", model_card(verdict).encode())
    write_whole(folder / "headwise-verdict.json", as_json(verdict.to_dict(), indent=1).encode())


def _resolved(out: str | Path) -> Path:
    """The result's folder by its real name."""
    if not isinstance(out, Path) and not out:
        raise OptionError("out is empty, expected the name of a new folder")
    with one_line(f"out is {out}", kind=OptionError):
        return local_path(out, kind=OptionError).resolve()

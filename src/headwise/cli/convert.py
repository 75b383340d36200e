"""`headwise convert`: a checkpoint moved to a cheaper attention, and what that costs."""

import shlex
from pathlib import Path
from typing import Any, Literal

from headwise.cli.documented import documented
from headwise.cli.options import Json, Model, Named, print_json, the_model
from headwise.cli.terminal import interrupted, screen


@documented
def convert(
    model: Model = None,
    *,
    named: Named = None,
    to: str,
    out: Path,
    calibration: Path | None = None,
    method: Literal["aware", "naive"] = "aware",
    tokens: int = 16384,
    length: int = 512,
    tune: int = 0,
    verdict: bool = True,
    as_json: Json = False,
) -> int:
    """Move a checkpoint to a cheaper attention, and say what that cost.

    Args:
        to: gqa:2 (2 kv heads), mqa, mla (everything kept), mla:50% (of the cache),
            mla:rank=128,rope=48, or mha (from MLA).
        out: The checkpoint's folder: new, or empty.
        calibration: A text file like what the model is for. Needed unless everything is kept (mla,
            mha), where it is what quality is measured on.
        method: Aware of the activations, or the plain baseline to compare with.
        tokens: Of the text, to calibrate with.
        length: Tokens of a calibration sequence.
        tune: Steps of distillation from the original, afterwards.
        verdict: Measure what the conversion cost, once the checkpoint is written.
    """
    from headwise import conversion
    from headwise.cli.convert_table import show
    from headwise.loading.progress import quiet_transformers
    from headwise.loading.source import demo_model

    chosen = the_model(model, named)
    options: dict[str, Any] = {
        "calibration": calibration,
        "out": out,
        "method": method,
        "tokens": tokens,
        "length": length,
        "tune": tune,
    }
    before = out.exists() and any(out.iterdir())
    try:
        with quiet_transformers(), screen(animated=False) as shown:
            made = conversion.convert(
                demo_model() if chosen is None else chosen,
                to,
                verdict=verdict,
                command=_command(chosen, to, options) + ("" if verdict else " --no-verdict"),
                progress=shown,
                **options,
            )
    except KeyboardInterrupt:
        state = f"the same command {'resumes from what is kept' if tune else 'restarts'}"
        if not before and (out / "config.json").is_file():
            state = f"the checkpoint in {out} is whole, its verdict was not measured"
        return interrupted(state)
    if as_json:
        print_json(made.to_dict())
    else:
        show(made, out)
    return 0


def _command(model: str | None, to: str, options: dict[str, Any]) -> str:
    """The command line that repeats this run, in the folder of its files."""
    named = [] if model is None else [Path(model).name if Path(model).exists() else model]
    words = ["headwise", "convert", *named, "--to", to]
    for option, value in options.items():
        if value is not None:
            words += [f"--{option}", value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)

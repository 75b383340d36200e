"""What conversions of one model cost in quality, aware of the activations and naive, side by side.

    python benchmarks/convert.py --out benchmarks/results/convert-smollm2.json --plot curve.svg

SmolLM2-135M by default, to MQA and to MLA with 100, 75, 50 and 25% of its cache. It is calibrated
on the language reference that comes with Python, and judged on the end of that text, which nothing
was fitted to, and on the files given with --also. With --tune also after so many steps of
distillation; a point that --out holds already is not made again.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

from report import environment
from rich import box
from rich.console import Console
from rich.table import Table

from headwise.base.written import check_writable, write_whole
from headwise.conversion.calibration import Calibration
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.coverage import check
from headwise.conversion.methods.layerwise import write_converted
from headwise.conversion.request import Request
from headwise.conversion.target import Target
from headwise.conversion.tuning.distillation import Tuning, distil
from headwise.conversion.verdict.quality import Judge
from headwise.conversion.verdict.verdict import CacheCost
from headwise.loading.model_folder import ModelFolder, model_folder
from headwise.loading.source import demo_model, find_source

TARGETS = "mqa,mla,mla:75%,mla:50%,mla:25%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--methods", default="aware,naive")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tune", type=int, default=0, help="steps, for the aware method")
    parser.add_argument("--also", type=Path, action="append", default=[], help="texts to judge on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    check_writable(given.out)
    folder = model_folder(given.model)
    with tempfile.TemporaryDirectory() as scratch:
        points = _points(given, folder, Path(scratch))
    Console(width=160).print(table(points))
    if given.plot is not None:
        plot(points, given.plot)


def _points(given: Any, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    checkpoint = Checkpoint(folder)
    tokenizer = checkpoint.tokenizer
    reference = scratch / "reference.txt"
    # From Z to A: the end of the other order is what the method's constants were chosen on.
    names = sorted(topics.topics, reverse=True)
    reference.write_text("\n\n".join(map(topics.topics.__getitem__, names)))
    text = Calibration.read(reference, tokenizer, given.tokens, given.length)
    held_out = {"reference": text.held_out}
    for file in given.also:
        held_out[file.name] = Calibration.read(file, tokenizer, given.length, given.length).held_out
    original = checkpoint.load()
    judges = {name: Judge(original, tokenizer, ids, _say) for name, ids in held_out.items()}
    points: list[dict[str, Any]] = []
    if given.out.exists():
        points = json.loads(given.out.read_text(encoding="utf-8"))["points"]
    for word in given.targets.split(","):
        for method in given.methods.split(","):
            target = Target.parse(word)
            steps = given.tune if method == "aware" and not target.exact else 0
            done = [(at["target"], at["method"], at["tuned"] is not None) for at in points]
            if (word, method, bool(steps)) in done or (target.exact and method == "naive"):
                continue
            out = scratch / "converted"
            out.mkdir()
            began = time.monotonic()
            check(checkpoint.config, target)
            request = Request(target=target, out=out, calibration=reference, method=method)
            errors = write_converted(checkpoint, request, text, out, _say)
            seconds = time.monotonic() - began
            point: dict[str, Any] = {"target": word, "method": method, "seconds": seconds}
            point["share"] = CacheCost.between(checkpoint.config, ModelFolder(out).config).share
            point["layer_errors"], point["tokens"] = errors, text.fitted.numel()
            point["converted"] = _quality(judges, _load(out))
            point |= {"tuned": None, "steps": steps, "tune_seconds": 0.0}
            if steps:
                began = time.monotonic()
                distil(original, student := _load(out), text.tuned, Tuning(steps), progress=_say)
                point["tune_seconds"] = time.monotonic() - began
                point["tuned"] = _quality(judges, student)
            shutil.rmtree(out)
            names = ("target", "method")
            points = [at for at in points if any(at[name] != point[name] for name in names)]
            points.append(point)
            report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv])}
            report |= {
                "model": find_source(given.model).name,
                "environment": environment(),
                "points": points,
            }
            write_whole(given.out, (json.dumps(report, indent=1) + "\n").encode())
    return points


def _load(folder: Path) -> Any:
    return ModelFolder(folder).load()


def _quality(judges: dict[str, Judge], model: Any) -> dict[str, dict[str, float]]:
    """On each text: how many times the original's perplexity, and the agreement."""
    found = {}
    for name, judge in judges.items():
        quality = judge.judge(model)
        factor = quality.perplexity / judge.original.perplexity
        found[name] = {"factor": factor, "agreement": quality.agreement}
        found[name]["original"] = judge.original.perplexity
    return found


def _say(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(stage, file=sys.stderr)


def table(points: list[dict[str, Any]]) -> Table:
    texts = list(points[0]["converted"])
    shown = Table("target", "cache", "method", "seconds", box=box.MARKDOWN)
    for name in texts:
        shown.add_column(f"perplexity, {name}", justify="right")
        shown.add_column("agreement", justify="right")
        shown.add_column("tuned", justify="right")
    for point in sorted(points, key=lambda at: (-at["share"], at["target"], at["method"])):
        cells = [point["target"], f"{point['share']:.0%}", point["method"]]
        cells.append(f"{point['seconds']:.0f}")
        for name in texts:
            quality, tuned = point["converted"][name], point["tuned"]
            cells += [f"{quality['factor']:.3f}x", f"{quality['agreement']:.1%}"]
            cells.append("" if tuned is None else f"{tuned[name]['factor']:.3f}x")
        shown.add_row(*cells)
    return shown


def plot(points: list[dict[str, Any]], file: Path) -> None:
    """Perplexity over the share of the cache, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "headwise"
    text = next(iter(points[0]["converted"]))
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    styles = {"aware": ("C0", "o"), "naive": ("C3", "s")}
    for method, (colour, marker) in styles.items():
        for mechanism, line in (("mla", "-"), ("mqa", "")):
            chosen = [
                (at["share"], at["converted"][text]["factor"], at["tuned"])
                for at in points
                if at["target"].startswith(mechanism)
                and (at["method"] == method or at["target"] == "mla")
            ]
            label = f"{mechanism.upper()}, {method}"
            fill = "full" if mechanism == "mla" else "none"
            values = [(share, factor) for share, factor, _ in sorted(chosen)]
            if values:
                axes.plot(
                    *zip(*values, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=line or "none",
                    fillstyle=fill,
                    label=label,
                )
    for mechanism, fill in (("mla", "full"), ("mqa", "none")):
        tuned = sorted(
            (at["share"], at["tuned"][text]["factor"])
            for at in points
            if at["tuned"] is not None and at["target"].startswith(mechanism)
        )
        if tuned:
            label = f"{mechanism.upper()}, aware and tuned"
            axes.plot(*zip(*tuned, strict=True), "C2^", fillstyle=fill, label=label)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("cache kept")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("perplexity, times the original's")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


if __name__ == "__main__":
    main()

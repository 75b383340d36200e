"""`headwise compare`: small decoders that differ in the attention alone, trained and timed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from headwise.cli.options import Json, print_json, the_document, words
from headwise.cli.terminal import screen


def compare(
    *,
    mechanisms: Annotated[
        str,
        typer.Option(
            help="mha, gqa-2 (2 kv heads), mqa, mla, mla-24 (a latent of 24), joined by commas."
        ),
    ] = "mha,gqa-2,mqa,mla",
    task: Annotated[
        Literal["recall", "text"],
        typer.Option(help="Associative recall, or the bytes of a text file."),
    ] = "recall",
    document: Annotated[Path | None, typer.Option(help="The text file for --task text.")] = None,
    text: Annotated[Path | None, typer.Option(hidden=True)] = None,  # the old name of --document
    steps: Annotated[int, typer.Option(help="Training steps of each run.")] = 1600,
    seeds: Annotated[int, typer.Option(help="Runs of each mechanism.")] = 1,
    width: Annotated[int, typer.Option(help="Hidden size of the decoders.")] = 64,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    layers: Annotated[int, typer.Option(help="Blocks of a decoder.")] = 2,
    pairs: Annotated[int, typer.Option(help="For recall: pairs in a sequence.")] = 32,
    vocabulary: Annotated[int, typer.Option(help="For recall: half are keys, half values.")] = 128,
    length: Annotated[int, typer.Option(help="For text: bytes of a training sequence.")] = 128,
    batch: Annotated[int, typer.Option(help="Tokens of a training step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="The highest of its schedule.")] = 2e-3,
    threads: Annotated[int, typer.Option(help="Of PyTorch, in training and timing.")] = 1,
    contexts: Annotated[
        str, typer.Option(help="Tokens in the cache when decoding is timed, joined by commas.")
    ] = "1024,8192,32768",
    rounds: Annotated[int, typer.Option(help="How often each mechanism is timed, in turn.")] = 21,
    out: Annotated[
        Path, typer.Option(help="A folder for the results; a run that it holds is not done again.")
    ] = Path("headwise-compare"),
    as_json: Json = False,
) -> int:
    """Train small decoders that differ in the attention alone; show quality, cache and speed."""
    from headwise.base import units
    from headwise.cli.compare_table import show
    from headwise.comparison import Configuration, Work
    from headwise.comparison.text import read
    from headwise.errors import OptionError

    file = the_document(document, text, old_name="--text")
    if (task == "text") != (file is not None):
        missing, given = "--task text", "--document FILE"
        if file is None:
            missing, given = given, missing
        raise OptionError(f"{given} needs {missing}")
    content, digest = (None, None) if file is None else read(file)
    configuration = Configuration(
        mechanisms=tuple(words(mechanisms)),
        task=task,
        text=digest,
        steps=steps,
        seeds=seeds,
        width=width,
        heads=heads,
        layers=layers,
        pairs=pairs,
        vocabulary=vocabulary,
        length=length,
        batch=batch,
        learning_rate=learning_rate,
        threads=threads,
    )
    work = Work(configuration, content, out, units.token_counts("--contexts", contexts), rounds)
    interrupted = False
    with screen(animated=False) as shown:
        try:
            work.carry_out(shown)
        except KeyboardInterrupt:
            interrupted = True
    if as_json:
        print_json(work.comparison.to_dict())
    else:
        show(work.comparison, out)
    if interrupted:
        typer.echo("headwise: interrupted; the same command goes on from here", err=True)
    return 130 if interrupted else 0

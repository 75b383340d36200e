"""`headwise view`: what each head attends to in a text, as a page, numbers or a picture."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwise.cli.options import TrustRemoteCode
from headwise.cli.terminal import screen
from headwise.console import harmless, one_line

SENTENCE = "The animal didn't cross the street because it was too tired"


def view(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a .gguf file, a hub id, minilm or smollm2. Default: minilm.",
            show_default=False,
        ),
    ] = None,
    *,
    named: Annotated[
        str | None, typer.Option("--model", help="The same as MODEL.", show_default=False)
    ] = None,
    text: Annotated[str, typer.Option(help="The text to look at.")] = SENTENCE,
    context: Annotated[
        Path | None, typer.Option(help="A text file to look at instead.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="As 0,4-6. Default: all.", show_default=False)
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Of each layer, as 0,4-6. Default: all.", show_default=False)
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Whose weights to keep in full: positions and words, as 0,4-6,it. Default: all, "
            "or in a long text the last ones.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[int, typer.Option(help="Tokens to decode after the text.")] = 0,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="A head to silence, as 5.2 for layer 5, head 2; give it again for more.",
            show_default=False,
        ),
    ] = None,
    overview: Annotated[
        bool, typer.Option(help="Pool the weights of all tokens, which takes time in long texts.")
    ] = True,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of weights and cache; auto keeps the checkpoint's."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto finds one.")] = "auto",
    out: Annotated[
        Path, typer.Option(help="The page (.html), the numbers (.json) or a picture (.png, .svg).")
    ] = Path("view.html"),
    trust_remote_code: TrustRemoteCode = False,
) -> int:
    """Show what each head attends to, in one page that needs no network."""
    from headwise import viewing
    from headwise.errors import OptionError
    from headwise.generation.text import read_document
    from headwise.loading.progress import quiet_transformers
    from headwise.viewing import selection
    from headwise.viewing.view import check_path

    if model is not None and named is not None:
        raise OptionError(f"model is {model!r} and --model {named!r}; give one of them")
    check_path(out)
    options: dict[str, Any] = {
        "layers": None if layers is None else selection.numbers("layers", layers),
        "heads": None if heads is None else selection.numbers("heads", heads),
        "tokens": None if tokens is None else selection.words(tokens),
        "without": [selection.head_name(each) for each in without or []],
    }
    shown_text = text if context is None else read_document(context)
    with quiet_transformers(), screen(animated=False) as shown:
        name, loaded, tokenizer = viewing.open_model(
            named if model is None else model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=shown,
        )
        found = viewing.view(
            loaded,
            tokenizer,
            shown_text,
            generate=generate,
            overview=overview,
            name=name,
            progress=shown,
            **options,
        )
        found.save(out)
    if found.ablation is not None:
        _show_ablation(found.ablation)
    if found.not_numbers:
        first = ".".join(map(str, found.not_numbers[0]))
        count = _count(len(found.not_numbers), "head")
        sys.stdout.write(f"weights are NaN in {count}, first {first}\n")
    kinds = ", ".join(dict.fromkeys(layer.mechanism for layer in found.layers))
    heads_seen = sum(len(layer.heads) for layer in found.layers)
    sys.stdout.write(
        harmless(
            f"{out}: {found.model}, {_count(len(found.tokens), 'token')}, "
            f"{_count(len(found.layers), 'layer')}, {_count(heads_seen, 'head')} ({kinds})\n"
        )
    )
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _show_ablation(found: Any) -> None:
    """The ten likeliest next tokens, before and after."""
    names = ", ".join(f"{layer}.{head}" for layer, head in found.heads)
    sys.stdout.write(f"next token, with all heads and without {names}:\n")
    for one, other in zip(found.before, found.after):
        sys.stdout.write(
            f"  {one_line(repr(one.token.text)):<16} {one.before:7.2%}   "
            f"{one_line(repr(other.token.text)):<16} {other.after:7.2%}\n"
        )
    sys.stdout.write(f"  divergence {found.divergence:.4f} bits\n")

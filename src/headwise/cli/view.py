"""`headwise view`: what each head attends to in a text, as a page, numbers or a picture."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.base.console import counted, harmless, one_line
from headwise.cli import options
from headwise.cli.documented import documented
from headwise.cli.terminal import screen

if TYPE_CHECKING:
    from headwise.viewing import Ablation, View

SENTENCE = "The animal didn't cross the street because it was too tired"


@documented
def view(
    model: str | None = None,
    *,
    named: options.Named = None,
    text: str = SENTENCE,
    pair: str | None = None,
    document: Path | None = None,
    context: options.OldDocument = None,
    layers: str | None = None,
    heads: str | None = None,
    tokens: str | None = None,
    generate: int = 0,
    without: list[str] | None = None,
    sparse: str | None = None,
    overview: bool = True,
    dtype: options.Dtype = "float32",
    device: options.Device = "auto",
    out: Path = Path("view.html"),
    as_json: options.Json = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> int:
    """Show what each head attends to, in one page that needs no network.

    Args:
        model: A model folder, a .gguf file, a hub id, minilm or smollm2. Default: minilm.
        text: The text to look at.
        pair: A second text, for encoders that read two.
        document: A text file to look at instead.
        layers: As 0,4-6. Default: all.
        heads: Of each layer, as 0,4-6. Default: all.
        tokens: Whose weights to keep in full: positions and words, as 0,4-6,it. Default: all, or in
            a long text the last ones.
        generate: Tokens to decode after the text.
        without: A head to silence, as 5.2 for layer 5, head 2; give it again for more.
        sparse: How many keys each token that is decoded gets, as topk:64,recent=16; those of the
            text see all.
        overview: Pool the weights of all tokens, which takes time in long texts.
        out: The page (.html), the numbers (.json) or a picture (.png, .svg).
    """
    from headwise import viewing
    from headwise.generation.text import read_document
    from headwise.loading.progress import quiet_transformers
    from headwise.viewing import selection
    from headwise.viewing.view import check_path

    model, file = options.the_model(model, named), options.the_document(document, context)
    check_path(out)
    chosen: dict[str, Any] = {
        "layers": None if layers is None else selection.numbers("layers", layers),
        "heads": None if heads is None else selection.numbers("heads", heads),
        "tokens": None if tokens is None else selection.words(tokens),
        "without": [selection.head_name(each) for each in without or []],
    }
    shown_text = text if file is None else read_document(file)
    with quiet_transformers(), screen(animated=False) as shown:
        name, loaded, tokenizer = viewing.open_model(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=shown,
        )
        seen = viewing.view(
            loaded,
            tokenizer,
            shown_text if pair is None else (shown_text, pair),
            generate=generate,
            overview=overview,
            sparse=sparse,
            name=name,
            progress=shown,
            **chosen,
        )
        seen.save(out)
    if as_json:
        options.print_json(_summary(seen, out))
        return 0
    if seen.ablation is not None:
        _show_ablation(seen.ablation)
    if seen.not_numbers:
        first = ".".join(map(str, seen.not_numbers[0]))
        count = counted(len(seen.not_numbers), "head")
        sys.stdout.write(f"weights are NaN in {count}, first {first}\n")
    if seen.states:
        listed = ", ".join(map(str, seen.states))
        sys.stdout.write(f"layers {listed} keep a state and have no weights\n")
    kinds = ", ".join(dict.fromkeys(layer.mechanism for layer in seen.layers))
    head_count = sum(len(layer.heads) for layer in seen.layers)
    sys.stdout.write(
        harmless(
            f"{out}: {seen.model}, {counted(len(seen.tokens), 'token')}, "
            f"{counted(len(seen.layers), 'layer')}, {counted(head_count, 'head')} ({kinds})\n"
        )
    )
    return 0


def _summary(seen: "View", out: Path) -> dict[str, Any]:
    """What was looked at and where it was written; the numbers themselves are `--out FILE.json`."""
    layers = [
        {"index": layer.index, "mechanism": layer.mechanism, "heads": len(layer.heads)}
        for layer in seen.layers
    ]
    ablation = None if seen.ablation is None else asdict(seen.ablation)
    tokens = [token.text for token in seen.tokens]
    names = {"out": str(out), "model": seen.model, "tokens": tokens, "layers": layers}
    return names | {"not_numbers": seen.not_numbers, "ablation": ablation}


def _show_ablation(ablation: "Ablation") -> None:
    """The ten likeliest next tokens, before and after."""
    names = ", ".join(f"{layer}.{head}" for layer, head in ablation.heads)
    sys.stdout.write(f"next token, with all heads and without {names}:\n")
    for one, other in zip(ablation.before, ablation.after):
        sys.stdout.write(
            f"  {one_line(repr(one.token.text)):<16} {one.before:7.2%}   "
            f"{one_line(repr(other.token.text)):<16} {other.after:7.2%}\n"
        )
    sys.stdout.write(f"  divergence {ablation.divergence:.4f} bits\n")

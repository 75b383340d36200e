"""`view`: one text through one model, and what its heads attended to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from headwise.base.files import local_path
from headwise.base.plot import check_plot
from headwise.base.progress import Progress, silent
from headwise.base.written import check_writable, write_whole
from headwise.errors import OptionError, SpecError, UnsupportedError
from headwise.spec import ModelSpec
from headwise.viewing import figure, page, selection
from headwise.viewing.ablation import Ablation, ablate
from headwise.viewing.capture import Capture, Wanted
from headwise.viewing.forward_pass import attached, predicts, run
from headwise.viewing.layer import LayerView
from headwise.viewing.tokens import Token, describe, tokenize

FORMATS = (".html", ".png", ".svg", ".json")


@dataclass(frozen=True, eq=False)
class View:
    """What a model attended to: in a notebook it shows itself; `save` writes it.

    tokens: those of the text, the first `prompt` of them, then those that were decoded. following:
    the token that the model predicts after them, None where it predicts none. layers: the weights,
    scores and figures of each layer. ablation: what silencing heads changes, where asked for.
    states: the layers of linear attention, which have a state and no weights.
    """

    model: str
    kind: str
    dtype: str
    tokens: tuple[Token, ...]
    prompt: int
    following: Token | None
    layers: tuple[LayerView, ...]
    overview: bool
    ablation: Ablation | None = None
    states: tuple[int, ...] = ()

    @property
    def not_numbers(self) -> tuple[tuple[int, int], ...]:
        """Heads, as (layer, head), some of whose weights are NaN: the model computes no numbers."""
        return tuple((layer.index, head) for layer in self.layers for head in layer.not_numbers)

    def save(
        self,
        path: str | Path,
        *,
        token: int | None = None,
        layer: int | None = None,
        head: int | None = None,
    ) -> None:
        """Write the page (.html), the numbers (.json) or a picture (.png, .svg).

        A picture is of what one token attends to, in the heads of a layer or of all, or in one
        head; or, without `token`, of all that one head attends to. What is not said is the one
        that the view has, or else the last token, of which every layer is shown.

        Raises:
            OptionError: another ending, a layer, head or token that the view does not have, or a
                file that cannot be written.
            UnsupportedError: a picture without Matplotlib.
        """
        path = local_path(path, kind=OptionError)
        check_path(path)
        ending = path.suffix.lower()
        if ending == ".html":
            write_whole(path, self.html().encode())
        elif ending == ".json":
            write_whole(path, page.numbers(self).encode())
        else:
            figure.write(self, path, token=token, layer=layer, head=head)

    def html(self) -> str:
        """The page, one file that asks nothing of any network."""
        return page.html(self)

    def _repr_html_(self) -> str:
        return (
            '<iframe title="headwise view" sandbox="allow-scripts allow-downloads" '
            'style="width:100%;height:900px;border:0" '
            f'srcdoc="{escape(self.html(), quote=True)}"></iframe>'
        )

    def __repr__(self) -> str:
        heads = sum(len(layer.heads) for layer in self.layers)
        return (
            f"View({self.model}: {len(self.tokens)} tokens, {len(self.layers)} layers, "
            f"{heads} heads; .save('view.html') writes it)"
        )


def check_path(path: Path) -> None:
    """Refuse, before any work is done, a file that could not be written.

    Raises:
        OptionError: another ending than .html, .png, .svg and .json, or no place to write to.
        UnsupportedError: a picture without Matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise OptionError(
            f"out is {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}"
        )
    if path.suffix.lower() in (".png", ".svg"):
        check_plot(path)
    check_writable(path)


def view(
    model: Any,
    tokenizer: Any,
    text: str | tuple[str, str],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    tokens: Sequence[int | str] | None = None,
    generate: int = 0,
    overview: bool = True,
    without: Sequence[tuple[int, int]] = (),
    sparse: str | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> View:
    """See what each head of a model attends to in a text.

    Example:
        >>> import headwise
        >>> from headwise.viewing import open_model
        >>> name, model, tokenizer = open_model()  # all-MiniLM-L6-v2
        >>> seen = headwise.view(model, tokenizer, "The animal was too tired", name=name)
        >>> seen
        View(all-MiniLM-L6-v2: 7 tokens, 6 layers, 72 heads; .save('view.html') writes it)
        >>> seen.layers[3].weights.shape  # [heads, rows, tokens]
        torch.Size([12, 7, 7])

    Args:
        model: a Transformers encoder or decoder that `headwise.attach` takes; it is attached for
            the run where it is not yet, and left as it was.
        tokenizer: the model's.
        text: one, or for an encoder a pair; special tokens are added as the tokenizer does.
        layers, heads: which to keep, by number; all by default.
        tokens: those whose weights are kept in full, by position or by their text; by default all,
            in long texts as many of the last as a page has room for.
        generate: tokens to decode after the text, greedily.
        overview: also pool the weights of all tokens; without it, figures of heads are of `tokens`
            alone, and looking on takes next to no time.
        without: heads to silence, as (layer, head), to see what the prediction owes them.
        sparse: how many keys each token that is decoded gets, as `headwise.attach` takes it; those
            of the text see all. For a model that is not attached yet.
        name: what to call the model; by default its config's name, or its class.
        progress: told how far the run is.

    Returns:
        A `View`. Nothing in it is larger than heads times chosen tokens times tokens.

    Raises:
        OptionError: an empty text, or a layer, head or token that is not there.
        ShapeError: more tokens than the model has positions for.
        UnsupportedError: a model that headwise cannot attach to, or an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} is an encoder-decoder; a view is of an encoder or a decoder"
        )
    if not isinstance(generate, int) or generate < 0:
        raise OptionError(f"generate is {generate!r}; expected 0 or more tokens")
    if sparse is not None and not generate:
        raise OptionError(
            f"sparse is {sparse!r}, which is for tokens to decode: give generate, too"
        )
    with attached(model, sparse) as how:
        if (generate or without) and not predicts(model):
            raise UnsupportedError(
                f"{type(model).__name__} predicts no next token: leave generate and without out"
            )
        if isinstance(text, tuple | list) and predicts(model):
            raise OptionError(
                f"a pair of texts is for encoders, and {type(model).__name__} reads one: give one"
            )
        ids, kinds = tokenize(model, tokenizer, text, generate)
        layer_count, head_count = _counts(model)
        layers = selection.within("layers", layers, layer_count)
        heads = selection.within("heads", heads, head_count)
        seen_heads = len(layers or range(layer_count)) * len(heads or range(head_count))
        texts = [token.text for token in describe(tokenizer, ids)]
        wanted = Wanted(
            layers=layers,
            heads=heads,
            rows=selection.rows(tokens, texts, generate, seen_heads),
            overview=overview,
            tokens=len(ids) + generate,
        )
        capture = Capture(model, wanted)
        decoded, following = run(model, ids, generate, capture, how, progress, kinds=kinds)
        total = len(ids) + len(decoded)
        states, ablation = _states(model), None
        if without:
            progress("silencing heads", 0, 0)
            ablation = ablate(model, tokenizer, [*ids, *decoded], without)
    return View(
        model=str(name or _name(model)),
        kind=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=tuple(describe(tokenizer, [*ids, *decoded])),
        prompt=len(ids),
        following=None if following is None else describe(tokenizer, [following])[0],
        layers=tuple(capture.views(total)),
        overview=overview,
        ablation=ablation,
        states=states,
    )


def _states(model: Any) -> tuple[int, ...]:
    """The layers of linear attention of an attached model."""
    reports = model._headwise.report.layers
    names = [layer.name.split(".")[1] for layer in reports if layer.what == "linear attention"]
    return tuple(sorted(int(name) for name in names if name.isdecimal()))


def _counts(model: Any) -> tuple[int, int]:
    """The number of layers, and of heads in the layer that has the most."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    try:
        spec = ModelSpec.from_config(config)
    except SpecError:
        return int(config.num_hidden_layers), heads
    layers = (*spec.layers, *spec.encoder_layers)
    attention = [layer.attention.heads for layer in layers if layer.attention]
    return int(config.num_hidden_layers), max(attention, default=heads)


def _name(model: Any) -> str:
    path = str(getattr(model.config, "_name_or_path", "") or "")
    return Path(path).name or type(model).__name__

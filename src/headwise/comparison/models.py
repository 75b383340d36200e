"""The decoders to compare: they differ in the attention, and in the MLPs by what that costs."""

import torch

from headwise.comparison.configuration import Configuration
from headwise.comparison.mixers import Remembering
from headwise.errors import OptionError
from headwise.nn import Decoder, Memory
from headwise.spec import LayerSpec, ModelSpec

_TEXT_VOCABULARY = 256


def build(configuration: Configuration, mechanism: str, seed: int) -> Decoder:
    """A decoder with this mechanism and as many parameters as the one with MHA.

    Weights that both have in the same shape (embedding, norms, often projections) start with the
    same values.

    >>> mha, mqa = (build(Configuration(), name, seed=0) for name in ("mha", "mqa"))
    >>> torch.equal(mha.embedding.weight, mqa.embedding.weight)
    True

    Raises:
        OptionError: the attention alone has more parameters than the decoder with MHA.
    """
    inner = feed_forward(configuration, mechanism)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _decoder(configuration, mechanism, inner)
        torch.manual_seed(seed)
        shared = _decoder(configuration, None, None).state_dict()
    fits = {
        name: shared[name]
        for name, weight in model.state_dict().items()
        if name in shared and shared[name].shape == weight.shape
    }
    model.load_state_dict(fits, strict=False)
    return model


def feed_forward(configuration: Configuration, mechanism: str) -> int:
    """Inner width of the MLPs that makes this decoder as large as that of MHA, 8/3 of its width.

    >>> [feed_forward(Configuration(), name) for name in ("mha", "mqa", "mla")]
    [192, 229, 190]

    Raises:
        OptionError: the attention alone has more parameters than the decoder with MHA.
    """
    one = 3 * configuration.width * configuration.layers  # parameters for one of inner width
    without = parameters(configuration, mechanism, 1) - one
    inner = round((parameters(configuration, None, None) - without) / one)
    if inner < 1:
        raise OptionError(
            f"{mechanism} has more parameters than a whole decoder with MHA at width "
            f"{configuration.width}; give "
            + (
                "more heads, or a smaller latent"
                if configuration.equal == "parameters"
                else "shorter sequences (pairs or length), whose state is smaller"
            )
        )
    return inner


def parameters(configuration: Configuration, mechanism: str | None, inner: int | None) -> int:
    """Parameters of the decoder whose MLPs have this inner width, by default that of MHA's.

    Without a mechanism, of that one: MHA, whatever else is equal.
    """
    with torch.device("meta"):
        model = _decoder(configuration, mechanism, inner)
    return sum(weight.numel() for weight in model.parameters())


def _decoder(configuration: Configuration, mechanism: str | None, inner: int | None) -> Decoder:
    text = configuration.task == "text"
    plain = (configuration.plain,) * configuration.layers
    mixers = plain if mechanism is None else configuration.mixers(mechanism)
    layers = [each.attention if isinstance(each, Remembering) else each for each in mixers]
    return Decoder(
        ModelSpec(
            family=mechanism or "mha",
            layers=tuple(LayerSpec(index, mixer) for index, mixer in enumerate(layers)),
            max_context=None,
        ),
        memory=Memory() if any(isinstance(each, Remembering) for each in mixers) else None,
        vocabulary=_TEXT_VOCABULARY if text else configuration.vocabulary,
        hidden_size=configuration.width,
        feed_forward=inner,
    )

"""One prompt on one loaded model, to be run with one attention or several and compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headwise.errors import LoadError, SpecError
from headwise.generation.answer import Answer, divergence, first_difference, identical
from headwise.generation.attention import Remember
from headwise.generation.options import Sampling, check_length, context_limit
from headwise.generation.recorder import OnPrefill, generate
from headwise.generation.text import TextStream, least_tokens, prompt_tokens
from headwise.hf import Remembered
from headwise.hf.packed import packed_formats
from headwise.loading.model_folder import ModelFolder
from headwise.loading.options import LoadOptions
from headwise.loading.source import demo_model, find_source
from headwise.spec import ModelSpec

OnText = Callable[[str], None]

# How far the logits of two right attentions may be apart, relative to the largest logit: what the
# rounding of a whole model's layers adds up to (docs/concepts/equality.md).
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass
class Session:
    """A loaded model with a prompt's tokens."""

    name: str
    model: Any
    tokenizer: Any
    prompt: list[int]
    sampling: Sampling

    @classmethod
    def open(
        cls,
        model: str | None,
        prompt: str,
        options: LoadOptions,
        sampling: Sampling,
        *,
        document: str = "",
        chat: bool = False,
    ) -> "Session":
        """Load a model (None: the demo model), after checking that prompt and answer fit it.

        The attention of `options` is not used: each answer selects its own.

        Raises:
            LoadError: no such model, or not one that is safe to read.
            ShapeError: prompt and answer are longer than the model's context.
            CapacityError: weights and cache would not fit in memory.
        """
        place = model if model is not None else demo_model()
        opened = ModelFolder.find(place, options)
        config, tokenizer = opened.config, opened.tokenizer
        check_decoder(place, config)
        limit = context_limit(config)
        if least := least_tokens(tokenizer, document):
            check_length(least, sampling.max_new_tokens, limit, at_least=True)
        tokens = prompt_tokens(tokenizer, prompt, document=document, chat=chat)
        check_length(len(tokens), sampling.max_new_tokens, limit)
        vocabulary = config.get_text_config(decoder=True).vocab_size
        if max(tokens, default=0) >= vocabulary:
            raise LoadError(
                f"{place}: its tokenizer made token {max(tokens)} and the model has {vocabulary}: "
                "they are not of one model"
            )
        length = len(tokens) + sampling.max_new_tokens
        loaded = opened.load(context=length, attention="eager")  # which every model has
        options.progress("warming up", 0, 0)
        _warm_up(loaded, tokens[:32])
        return cls(find_source(place).name, loaded, tokenizer, tokens, sampling)

    def run(
        self,
        attention: str,
        *,
        cache: str = "contiguous",
        cache_limit: str | None = None,
        sparse: str | None = None,
        remember: Remember = None,
        context_parallel: Any = None,
        keep_logits: bool = False,
        on_prefill: OnPrefill | None = None,
        on_text: OnText | None = None,
    ) -> Answer:
        """Run the prompt with one attention; `on_text` gets the answer's text, one piece per token.

        `cache`, `cache_limit`, `sparse`, `remember` and `context_parallel` are for headwise, as
        `headwise.attach` takes them. `keep_logits`: as `divergence` needs them.
        """
        stream = TextStream(self.tokenizer)

        def on_token(token: int) -> None:
            if on_text is not None:
                on_text(stream.push(token))

        answer = generate(
            self.model,
            self.prompt,
            attention=attention,
            cache=cache,
            cache_limit=cache_limit,
            sparse=sparse,
            remember=remember,
            context_parallel=context_parallel,
            keep_logits=keep_logits,
            sampling=self.sampling,
            on_prefill=on_prefill,
            on_token=on_token,
        )
        if on_text is not None and (rest := stream.finish()):
            on_text(rest)
        return answer

    def remember(
        self,
        remembered: Remembered,
        *,
        cache: str = "contiguous",
        on_prefill: OnPrefill | None = None,
    ) -> Remembered:
        """Read the prompt, from what is known of it on, and store its cache; what came of it."""
        # the answer's first token has to be computed, and is not stored
        self.run("headwise", cache=cache, remember=remembered, on_prefill=on_prefill)
        return remembered

    @property
    def weights(self) -> str:
        """What the weights are: the blocks that they are packed in, or numbers of the dtype."""
        formats = packed_formats(self.model)
        return f"weights packed in {', '.join(formats)}" if formats else "float weights"

    def text(self, answer: Answer) -> str:
        """An answer as text."""
        return str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))

    def report(self, answers: list[Answer]) -> dict[str, Any]:
        """The answers as plain data, for JSON; times in seconds, sizes in bytes."""
        token = None
        if identical(answers) is False:
            token = first_difference(answers[0].tokens, answers[1].tokens)
        return {
            "model": self.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "weights": self.weights,
            "prompt_tokens": len(self.prompt),
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "runs": [answer.report(self.text(answer)) for answer in answers],
            "identical": identical(answers),
            "kl": self.kl(answers),
            "first_difference": None
            if token is None
            else {"token": token, "near_tie": self.near_tie(answers, token)},
        }

    def kl(self, answers: list[Answer]) -> dict[str, float] | None:
        """How far the first answer's distributions are from the second's, which is the truth."""
        found = divergence(answers[1], answers[0]) if len(answers) > 1 else None
        return None if found is None else {"nats": found[0], "tokens": found[1]}

    def near_tie(self, answers: list[Answer], token: int) -> bool:
        """Whether every answer found its choice of token `token` too close to call in its dtype."""
        tolerance = LOGIT_TOLERANCE.get(self.model.dtype, 0.0)
        margins = [answer.margins[token] for answer in answers if token < len(answer.margins)]
        return all(margin.lead <= tolerance * abs(margin.best) for margin in margins)


def check_decoder(place: str, config: Any) -> None:
    """Refuse what does not write text token after token."""
    if config.is_encoder_decoder:
        raise LoadError(
            f"{place} is an encoder-decoder ({config.model_type}); the command needs a decoder. In "
            "Python headwise.attach works on it"
        )
    try:
        writes = bool(ModelSpec.from_config(config).layers)
    except SpecError:
        return  # a family without a reader
    if not writes:
        raise LoadError(
            f"{place} is an encoder ({config.model_type}) and writes no text; give a decoder"
        )


def _warm_up(model: Any, tokens: list[int]) -> None:
    """One forward pass, so that no measured run pays for what is done once.

    Weights are read from disk by their first use, and kernels are chosen by theirs.
    """
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    if not bool(output.logits.isfinite().all()):
        raise LoadError(
            f"the model's logits are not numbers in {str(model.dtype)[6:]}: its weights are "
            "damaged, or need another --dtype"
        )

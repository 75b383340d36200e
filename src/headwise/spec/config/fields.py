"""Fields of a config, whatever carries them: a dict, a config object, a parsed config.json."""

from collections.abc import Mapping
from types import MappingProxyType

from headwise.errors import SpecError
from headwise.spec.checks import boolean, finite, integer, positive_int, shown

_MISSING = object()
# A layer is an object here: a damaged config must not take the machine's memory.
_MOST_LAYERS = 10_000
_NONE: Mapping[str, str] = MappingProxyType({})
_NOTHING: Mapping[str, object] = MappingProxyType({})


class ConfigFields:
    """Typed look-up of a config's fields, each with the default of its config class.

    >>> fields = ConfigFields({"n_embd": 768}, aliases={"hidden_size": "n_embd"})
    >>> fields.positive("n_embd")
    768
    >>> fields.positive("n_head")
    Traceback (most recent call last):
    headwise.errors.SpecError: n_head is missing: expected it in the config

    Args:
        source: a dict, an object with `to_dict()`, or an object with attributes.
        defaults: value of each field that the config leaves out.
        aliases: other name -> name of the field.
        instead: what holds whatever the config says, as a config around this one has it.

    Raises:
        SpecError: when `source` cannot be a config, and from each look-up, naming the field.
    """

    def __init__(
        self,
        source: object,
        *,
        defaults: Mapping[str, object] = _NONE,
        aliases: Mapping[str, str] = _NONE,
        instead: Mapping[str, object] = _NOTHING,
    ) -> None:
        if source is None or isinstance(source, str | int | float | list | tuple | type):
            raise SpecError(
                f"config is {type(source).__name__} {shown(source)}: "
                "expected a Hugging Face config or its dict"
            )
        # to_dict undoes what a config class converts on the way in, so an object and the
        # config.json that it came from show the same values here.
        to_dict = None if isinstance(source, Mapping) else getattr(source, "to_dict", None)
        self._source = to_dict() if callable(to_dict) else source
        self._defaults = defaults
        self._aliases = aliases
        self._instead = instead

    def raw(self, name: str) -> object:
        """The field as the config gives it, else its default, else None."""
        value = self._given(name)
        return self._defaults.get(name) if value is _MISSING else value

    def positive(self, name: str) -> int:
        """An integer of at least 1."""
        return positive_int(name, self._required(name))

    def layers(self, name: str) -> int:
        """A number of layers: at least 1, and no more than any model can have."""
        count = self.positive(name)
        if count > _MOST_LAYERS:
            raise SpecError(f"{name}={count}: expected at most {_MOST_LAYERS:,}; correct {name}")
        return count

    def whole(self, name: str) -> int:
        """An integer of at least 0."""
        return integer(name, self._required(name), least=0)

    def optional_positive(self, name: str) -> int | None:
        """An integer of at least 1, or None."""
        value = self._required(name)
        return None if value is None else positive_int(name, value)

    def number(self, name: str) -> float:
        """A finite number above 0."""
        return finite(name, self._required(name))

    def optional_number(self, name: str) -> float | None:
        """A finite number above 0, or None."""
        value = self._required(name)
        return None if value is None else finite(name, value)

    def flag(self, name: str) -> bool:
        """True or False."""
        return boolean(name, self._required(name))

    def optional_flag(self, name: str) -> bool:
        """True or False, where the config class lets null stand for False."""
        value = self._required(name)
        return False if value is None else boolean(name, value)

    def model_type(self, default: str | None = None) -> str:
        """The model_type, `default` where it is left out."""
        value = self.raw("model_type")
        if value is None:
            value = default
        if not isinstance(value, str) or not value:
            raise SpecError(
                f"model_type={shown(value)}: expected the family's name; "
                "give a Hugging Face config (model.config, or a parsed config.json)"
            )
        return value

    def _required(self, name: str) -> object:
        value = self._given(name)
        if value is _MISSING:
            value = self._defaults.get(name, _MISSING)
        if value is _MISSING:
            raise SpecError(f"{name} is missing: expected it in the config")
        return value

    def _given(self, name: str) -> object:
        value = self._get(name)
        for other, target in self._aliases.items():
            if target != name:
                continue
            renamed = self._get(other)
            if renamed is _MISSING:
                continue
            if value is not _MISSING and value != renamed:
                raise SpecError(
                    f"{other}={shown(renamed)} contradicts {name}={shown(value)}: "
                    "they are one field; give it once"
                )
            value = renamed
        return value

    def _get(self, name: str) -> object:
        if name in self._instead:
            return self._instead[name]
        if isinstance(self._source, Mapping):
            return self._source.get(name, _MISSING)
        return getattr(self._source, name, _MISSING)

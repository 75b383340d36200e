"""What can go wrong, as exception types.

Every error that headwise raises on purpose is a `HeadwiseError` and also the built-in exception
that a caller would expect. Messages say what was given, what was expected and what to do.
"""


class HeadwiseError(Exception):
    """Base of every error that headwise raises on purpose."""


class SpecError(HeadwiseError, ValueError):
    """A model configuration that cannot be read or contradicts itself."""


class ShapeError(HeadwiseError, ValueError):
    """Tensors or lengths that do not fit together."""


class UnsupportedError(HeadwiseError, NotImplementedError):
    """A valid request that the chosen backend or model cannot serve."""


class CapacityError(HeadwiseError, MemoryError):
    """A request that would not fit in memory; raised before anything is allocated."""


class ConversionError(HeadwiseError, ValueError):
    """A checkpoint that cannot be moved to the asked mechanism."""


class LoadError(HeadwiseError, OSError):
    """A model file or folder that is missing, is not a model, or is not safe to read."""


class OptionError(HeadwiseError, ValueError):
    """An option outside the values that it can have."""


class RankError(HeadwiseError, RuntimeError):
    """Processes that share a context and do not agree, or of which one has ended or stalls."""

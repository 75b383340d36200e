"""headwise itself: on its default backend, on the others, and on its own caches."""

from collections.abc import Callable

from torch import Tensor

import headwise.ops as ops
from headwise.bench.candidate import BOTH, Bind, Candidate, on_each
from headwise.caches import PagedCache, QuantizedCache
from headwise.errors import UnsupportedError
from headwise.measure.inputs import Inputs
from headwise.ops import Backend, Bits


def on_backend(backend: Backend) -> Candidate:
    """headwise.latent_attention on one of its backends, by name."""

    def missing() -> str | None:
        available, reason = backend.available()
        return None if available else reason

    def build(inputs: Inputs) -> Bind:
        if inputs.explain().runs.backend == backend.name:
            raise UnsupportedError(f"headwise runs on its {backend.name} backend here itself")
        return on_each(lambda inputs: inputs.attend(backend.name))

    return Candidate(
        backend.name,
        f"headwise's {backend.name} backend (mla only)",
        build,
        missing=missing,
        operators=("latent_attention",),
    )


def _on_cache(make: Callable[[], PagedCache | QuantizedCache]) -> Callable[[Inputs], Bind]:
    def bind(inputs: Inputs) -> Callable[[], Tensor]:
        kv = make().append(*inputs.rows)
        return lambda: inputs.attend(kv=kv)

    return lambda inputs: bind


def _paged(size: int) -> Candidate:
    about = f"headwise on its cache in pages of {size} tokens"
    return Candidate(f"paged-{size}", about, _on_cache(lambda: PagedCache(size)), operators=BOTH)


def _quantized(bits: Bits) -> Candidate:
    def rounded(inputs: Inputs) -> Inputs:
        """The inputs as the cache stores them, in float32."""
        integers = (ops.quantize(rows, bits) for rows in inputs.rows)
        return inputs.with_rows(*(ops.dequantize(*rows, bits=bits) for rows in integers))

    return Candidate(
        f"int{bits}",
        f"headwise on its cache of {bits}-bit integers",
        _on_cache(lambda: QuantizedCache(bits)),
        operators=BOTH,
        rounded=rounded,
        bits=bits,
    )


HEADWISE = Candidate(
    "headwise",
    "headwise, its default backend",
    lambda inputs: on_each(lambda inputs: inputs.attend()),
    operators=BOTH,
)
# Of the operator that PyTorch does not have. The fastest backend is headwise's default, and the
# reference is what results are checked against.
BACKENDS = tuple(
    on_backend(backend) for backend in ops.backends()[1:] if backend.name != "reference"
)
CACHES = (_paged(16), _paged(64), _quantized(8), _quantized(4))

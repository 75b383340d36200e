"""What Transformers makes of the tensors of a GGUF file, a weight at a time.

Transformers has two readers, each of which reads a whole file at once. Here their own functions are
called on the tensors of one weight: which weight a name stands for, and what is done to the values.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from headwise.errors import LoadError
from headwise.loading.gguf.file import GgufFile


class StockReader(ABC):
    """One of the two: `places` says by the name of a tensor which weight of the model it fills.

    Not every one of them is of the file, and not every weight of the model.
    """

    places: Mapping[str, str]

    def place(self, name: str) -> str:
        """The weight that a tensor fills; its own name where there is none."""
        return self.places.get(name) or self.places.get(name.removesuffix(".weight"), name)

    @abstractmethod
    def make(self, weight: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """A weight, float32, of the dequantised values of all tensors that fill it, by name."""


def stock_reader(gguf: GgufFile, model: Any) -> StockReader:
    """The reader that Transformers takes for a file; `model` is of its config, without data."""
    from headwise.hf.stock_names import is_gguf_arch_supported

    newer = is_gguf_arch_supported(gguf.architecture.name)
    return _Newer(gguf, model) if newer else _Older(gguf, model)


def sources(gguf: GgufFile, reader: StockReader, model: Any) -> dict[str, list[str]]:
    """The names of the file's tensors that fill each weight of `model`."""
    weights, found = model.state_dict(), defaultdict(list)
    for name in gguf.tensors:
        if (place := reader.place(name)) in weights:
            found[place].append(name)
    return dict(found)


def float_weights(gguf: GgufFile, model: Any, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Those weights `names` of the model that the file holds, float32, each as it is asked for.

    They are to the bit those of `from_pretrained`, which dequantises the whole file. The tensors of
    one weight are in memory at a time. A weight that no tensor fills (a tied one) is left out.

    Args:
        gguf: the header of a file; its tensors are read here.
        model: Transformers' model of the file's config, on the meta device.
        names: as in the model's `state_dict`.
    """
    from headwise.hf.stock_names import load_gguf_state_dict

    reader, stored = stock_reader(gguf, model), load_gguf_state_dict(gguf.header)
    found = sources(gguf, reader, model)
    for weight in names:
        if weight in found:
            tensors = {name: stored[name] for name in found[weight]}
            yield weight, reader.make(weight, _values(gguf, tensors)).contiguous()


class _Newer(StockReader):
    """By renamings and converters, which see values in the dtype that the file has them in."""

    def __init__(self, gguf: GgufFile, model: Any) -> None:
        from headwise.hf.stock_names import (
            WeightConverter,
            WeightRenaming,
            get_gguf_conversion_mapping,
            rename_source_key,
        )

        self.config = model.config
        mapping = get_gguf_conversion_mapping(gguf.architecture.name, self.config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found = {name: rename_source_key(name, renamings, converters) for name in gguf.tensors}
        self.places = {name: place for name, (place, _) in found.items()}
        self.patterns = {name: pattern for name, (_, pattern) in found.items()}
        self.converters = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }

    def make(self, weight: str, tensors: Mapping[str, Tensor]) -> Tensor:
        pattern = self.patterns[next(iter(tensors))]
        if pattern is None:
            (values,) = tensors.values()
            return values.float()
        converter = self.converters[pattern]
        for name, values in tensors.items():
            converter.add_tensor(weight, name, self.patterns[name], values)
        return converter.convert(weight, config=self.config)[weight].float()


class _Older(StockReader):
    """By a name map and a processor, which sees float32."""

    def __init__(self, gguf: GgufFile, model: Any) -> None:
        from headwise.hf.stock_names import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        kind = TENSOR_PROCESSORS.get(gguf.architecture.name, TensorProcessor)
        self.file, self.processor = gguf.path, kind(config=model.config.to_dict())
        self.places = get_gguf_hf_weights_map(_Shallow(model, depth=1), self.processor)

    def make(self, weight: str, tensors: Mapping[str, Tensor]) -> Tensor:
        made: dict[str, Tensor] = {}
        for name, values in tensors.items():
            done = self.processor.process(
                weights=values.float().numpy(),
                name=name,
                tensor_key_mapping=self.places,
                parsed_parameters={"tensors": made},  # where some put what they make
            )
            if done.name in self.places:
                made[self.places[done.name]] = torch.from_numpy(done.weights)
        if weight not in made:
            raise LoadError(
                f"{self.file}: Transformers makes no {weight} of {' and '.join(tensors)}; give the "
                "original model's folder"
            )
        return made[weight]


class _Shallow:
    """A model with its children down to one depth, for the name map alone.

    Transformers makes that map again for every module of the tree (29 s for a 135M model); only the
    model and the base model in it (Bloom's names) ever add a name.
    """

    def __init__(self, module: torch.nn.Module, depth: int) -> None:
        self.module, self.depth = module, depth
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Shallow"]]:
        if not self.depth:
            return []
        return [
            (name, _Shallow(child, self.depth - 1)) for name, child in self.module.named_children()
        ]


def _values(gguf: GgufFile, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the file, read: float32 where they are blocks, else as they are."""
    from gguf import dequantize

    read = {name: tensor[...] for name, tensor in tensors.items()}
    for name, values in read.items():
        if values.dtype == torch.uint8:
            kind = gguf.tensors[name].ggml_type
            read[name] = torch.from_numpy(dequantize(values.numpy(), kind))
    return read

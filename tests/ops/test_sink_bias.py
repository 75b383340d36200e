"""sink_bias: a number added to every score of the first token, which a bias could say as well."""

import pytest
import torch

from headwise import ShapeError, attention


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"window": 5}, {"return_lse": True}, {"lengths": True}]
)
@pytest.mark.parametrize("rows", [1, 13])
def test_it_is_a_bias_on_the_first_key(backend: str, options: dict, rows: int) -> None:
    query, key, value = (
        torch.randn(2, 6, rows, 7),
        torch.randn(2, 3, 17, 7),
        torch.randn(2, 3, 17, 7),
    )
    options = {"causal": True, **options}
    if options.pop("lengths", False):
        options["kv_lengths"] = torch.tensor([17, 14])
    bias = torch.zeros(1, 1, 1, 17)
    bias[..., 0] = 1.5
    given = attention(query, key, value, sink_bias=1.5, backend=backend, **options)
    expected = attention(query, key, value, bias=bias, backend="reference", **options)
    torch.testing.assert_close(given, expected)
    plain = attention(query, key, value, backend=backend, **options)
    if "window" not in options:
        assert not torch.allclose(plain[0], given[0])


def test_a_sink_bias_that_is_no_number_is_named() -> None:
    query = torch.randn(1, 1, 1, 3)
    with pytest.raises(ShapeError, match="sink_bias is nan, expected a finite number"):
        attention(query, query, query, sink_bias=float("nan"))

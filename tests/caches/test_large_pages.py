"""Buffers of caches ask for large pages; what is too small, or elsewhere, does not."""

import sys
from unittest import mock

import pytest
import torch

from headwise.caches import ContiguousCache, contiguous
from headwise.caches.large_pages import advise_large_pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages of Linux")
def test_whole_pages_inside_a_tensor_are_asked_for():
    page = 2 * 2**20
    buffer = torch.empty(8 * 2**20, dtype=torch.uint8)
    with mock.patch("ctypes.CDLL") as library:
        library.return_value.madvise.return_value = 0
        assert advise_large_pages(buffer)
    begin, length, advice = library.return_value.madvise.call_args.args
    assert advice == 14
    assert begin % page == 0 and length % page == 0
    assert buffer.data_ptr() <= begin < buffer.data_ptr() + page
    assert begin + length <= buffer.data_ptr() + buffer.nbytes < begin + length + page


def test_advice_that_the_system_refuses_is_no_error():
    with mock.patch("ctypes.CDLL") as library:
        library.return_value.madvise.return_value = -1
        assert not advise_large_pages(torch.empty(8 * 2**20, dtype=torch.uint8))


def test_other_devices_are_left_alone():
    assert not advise_large_pages(torch.empty(8 * 2**20, device="meta"))


def test_every_buffer_of_a_cache_asks():
    cache, asked = ContiguousCache(), []
    with mock.patch.object(contiguous, "advise_large_pages", asked.append):
        cache.append(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4))
    assert [buffer.shape[3] for buffer in asked] == [8, 4]

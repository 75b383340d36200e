"""Large pages for large buffers.

Decoding reads a whole cache once a token. In pages of 4 KiB the processor then waits for addresses
as well as for data, twice over in a virtual machine; pages of 2 MiB remove that.
"""

import ctypes
import sys

from torch import Tensor

_PAGE = 2 * 2**20
_MADV_HUGEPAGE = 14


def advise_large_pages(tensor: Tensor) -> bool:
    """Ask the system to back a new, untouched CPU tensor with pages of 2 MiB, where they fit whole.

    It is advice: what is not Linux, or has no such pages, goes on as before. True if it was taken.

    >>> import torch
    >>> advise_large_pages(torch.empty(10))  # no whole page fits
    False
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return False
    if type(tensor) is not Tensor:
        return False  # a fake one, without memory
    first = tensor.data_ptr()
    begin = (first + _PAGE - 1) // _PAGE * _PAGE
    length = (first + tensor.nbytes) // _PAGE * _PAGE - begin
    if length <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(begin, length, _MADV_HUGEPAGE) == 0)

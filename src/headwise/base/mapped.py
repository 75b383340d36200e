"""Memory over which parts of files are mapped, and which is room where none is."""

import ctypes
import mmap
import os
import sys

from headwise.errors import CapacityError

# What a part of a file has to begin at, and be long, a multiple of to be mapped and not read.
ALIGNMENT = 4096
_MAP_FIXED = 0x10  # on Linux and on macOS
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def reserve(size: int, what: str) -> mmap.mmap:
    """`size` bytes of zeros that take memory as they are written to.

    Raises:
        CapacityError: there is no address space, or no memory, for it; `what` says for what.
    """
    try:
        if os.name == "nt":
            return mmap.mmap(-1, max(1, size))
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        return mmap.mmap(-1, max(1, size), flags)
    except (OSError, ValueError, OverflowError) as error:
        raise CapacityError(f"{what} needs {size:,} bytes: {error}") from error


def map_part(memory: mmap.mmap, begin: int, file: int, offset: int, size: int) -> None:
    """Put `size` bytes of an open file, from `offset` on, at `begin` of reserved memory.

    They stay the pages of the system's cache, which all processes that map them share, until they
    are written to: then this process gets a page of its own, and the file stays as it is. Where
    the system cannot map them, they are read.

    Raises:
        OSError: the file does not have them.
    """
    if not (offset >= 0 and begin >= 0 and size >= 0 and begin + size <= len(memory)):
        raise OSError(f"{size:,} bytes do not fit at {begin:,} of {len(memory):,}")
    if os.fstat(file).st_size < offset + size:
        raise OSError(f"{size:,} bytes from {offset:,} on are not in the file")
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + begin
    if size and not _map_over(address, file, offset, size):
        _read_into(memoryview(memory)[begin : begin + size], file, offset)


def _map_over(address: int, file: int, offset: int, size: int) -> bool:
    """Put a part of a file in the place of memory that was reserved; False where that cannot be."""
    if os.name == "nt" or any(at % mmap.ALLOCATIONGRANULARITY for at in (address, offset, size)):
        return False
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_longlong)
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    return bool(call(address, size, prot, flags, file, offset) == address)


def _read_into(target: memoryview, file: int, offset: int) -> None:
    with os.fdopen(os.dup(file), "rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < len(target):
            count = stream.readinto(target[done:])
            if not count:
                raise OSError("the file ends before its part does")
            done += count

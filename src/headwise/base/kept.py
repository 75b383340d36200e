"""Where what is made once is kept: converted models, what was measured of the machine."""

import os
from pathlib import Path

from headwise.base.files import local_path
from headwise.errors import LoadError

CACHE_VARIABLE = "HEADWISE_CACHE"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of thing: in $HEADWISE_CACHE, else in the user's cache folder.

    Raises:
        LoadError: what the variable says cannot be a path.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        try:
            return local_path(chosen) / kind
        except LoadError as error:
            raise LoadError(f"{CACHE_VARIABLE}: {error}; set it to a folder") from error
    import platformdirs

    return Path(platformdirs.user_cache_dir("headwise")) / kind

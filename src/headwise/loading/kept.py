"""Where what is made once is kept: converted models, what was measured of the machine."""

import os
from pathlib import Path

CACHE_VARIABLE = "HEADWISE_CACHE"


def cache_folder(kind: str) -> Path:
    """The folder of one kind of thing: in $HEADWISE_CACHE, else in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / kind
    import platformdirs

    return Path(platformdirs.user_cache_dir("headwise")) / kind

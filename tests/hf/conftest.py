"""The tests of this folder run on older releases of Transformers too."""

import older_stock  # noqa: F401

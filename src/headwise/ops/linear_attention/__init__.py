"""Linear attention: a state of fixed size in place of keys and values."""

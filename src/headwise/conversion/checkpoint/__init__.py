"""A checkpoint on the disk: opened, its weights read and written, and what lies beside them."""

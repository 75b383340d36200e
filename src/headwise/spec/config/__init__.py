"""What the families read a config with: typed fields, head counts, windows, layouts."""

"""Distillation: a converted model is taught to give the outputs of the original."""

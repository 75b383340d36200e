"""What a model attends to: captured as it runs, shown as a page, numbers or a picture."""

from headwise.viewing.ablation import Ablation, Guess
from headwise.viewing.layer import LayerView
from headwise.viewing.models import open_model
from headwise.viewing.tokens import Token
from headwise.viewing.view import View, view

__all__ = ["Ablation", "Guess", "LayerView", "Token", "View", "open_model", "view"]

"""What a model's cache costs, before it is loaded."""

from headwise.planning.costs import Cost
from headwise.planning.devices import DEVICES, Device
from headwise.planning.named_models import NamedModel, named_model, named_models
from headwise.planning.planner import Allocated, Alternative, LayerGroup, Plan, Step, plan
from headwise.planning.plot import write_plot
from headwise.planning.verification import CacheCheck, TimeCheck, Verified, verify
from headwise.planning.weights import Experts, Weights

__all__ = [
    "Cost",
    "Experts",
    "Weights",
    "CacheCheck",
    "TimeCheck",
    "Verified",
    "verify",
    "write_plot",
    "DEVICES",
    "Allocated",
    "Alternative",
    "Device",
    "LayerGroup",
    "NamedModel",
    "Plan",
    "Step",
    "named_model",
    "named_models",
    "plan",
]

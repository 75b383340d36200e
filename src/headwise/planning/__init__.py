"""What a model's cache costs, before it is loaded."""

from headwise.planning.allocation import Allocated
from headwise.planning.alternatives import Alternative
from headwise.planning.costs import Cost
from headwise.planning.decode_times import TimeCheck
from headwise.planning.devices import DEVICES, Device
from headwise.planning.estimates import Step
from headwise.planning.layer_groups import LayerGroup
from headwise.planning.named_models import NamedModel, named_model, named_models
from headwise.planning.planner import Plan, plan
from headwise.planning.plot import write_plot
from headwise.planning.verification import CacheCheck, Verified, verify
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

"""Adam for parameters of any dtype and scale, with a state that can be kept."""

import math

import torch
from torch import Tensor

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WARMUP = 0.1
# Parameters that are all zero, as a new bias may be, move as if they were this large.
_SMALLEST = 1e-3


class Descent:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) in float32, whose rate rises and then falls.

    The rate rises for 1/10 of the steps and falls to 0 as a cosine; gradients are clipped to a norm
    of 1 over all parameters.

    Args:
        parameters: by name; they are changed in place.
        learning_rate: at its height, the share of its own root mean square, as it is now, that a
            parameter moves in a step. One value so fits models of any width and latents of any
            scale.
        steps: how many will be made.
    """

    def __init__(self, parameters: dict[str, Tensor], learning_rate: float, steps: int) -> None:
        self.parameters, self.learning_rate, self.steps = parameters, learning_rate, steps
        # of a float32 parameter no copy: the same memory
        self.masters = {name: at.detach().float() for name, at in parameters.items()}
        self.sizes = [_size(master) for master in self.masters.values()]
        groups = [{"params": [master]} for master in self.masters.values()]
        self.adam = torch.optim.Adam(groups, betas=_BETAS, fused=True)

    def step(self, step: int) -> bool:
        """Make step `step`, from 0, and use up the gradients.

        Returns False where they are not finite, and nothing has changed then.
        """
        for parameter, master in zip(self.parameters.values(), self.masters.values()):
            assert parameter.grad is not None  # it takes part in the loss
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), _CLIP)
        if not torch.isfinite(norm):
            return False
        rate = self.learning_rate * _schedule(step, self.steps)
        for group, size in zip(self.adam.param_groups, self.sizes):
            group["lr"] = rate * size
        self.adam.step()
        self.adam.zero_grad()  # their memory is the next backward pass's
        self._publish()
        return True

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, in float32, by name."""
        found = {}
        for name, master in self.masters.items():
            found[f"{name}.weight"] = master.contiguous()
            for moment in _MOMENTS:
                found[f"{name}.{moment}"] = self.adam.state[master][moment].contiguous()
        return found

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take up what `state` gave after `steps` steps."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"{name}.weight"])
            held = {at: tensors[f"{name}.{at}"].to(master.device) for at in _MOMENTS}
            count = torch.tensor(float(steps), device=master.device)
            self.adam.state[master] = {"step": count, **held}
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.parameters.values(), self.masters.values()):
            parameter.copy_(master)


def _size(master: Tensor) -> float:
    return max(master.square().mean().sqrt().item(), _SMALLEST)


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate's height that a step (from 0) takes.

    >>> [round(_schedule(step, 100), 2) for step in (0, 9, 54, 99)]
    [0.1, 1.0, 0.51, 0.0]
    """
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))

"""Adam for parameters of any dtype and scale, with a state that a tuning resumes from."""

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WARMUP = 0.1
# Parameters that are all zero, as a new bias may be, move as if they were this large.
_SMALLEST = 1e-3


class ScaledAdam:
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
        self.parameters, self.steps = parameters, steps
        # of a float32 parameter no copy: the same memory
        self.masters = {name: tensor.detach().float() for name, tensor in parameters.items()}
        groups = []
        for master in self.masters.values():
            rate = learning_rate * max(master.square().mean().sqrt().item(), _SMALLEST)
            groups.append({"params": [master], "lr": rate, "initial_lr": rate})
        self.adam = torch.optim.Adam(groups, betas=_BETAS, fused=True)
        self._schedule_after(0)

    def step(self) -> bool:
        """Make the next step, and use up the gradients.

        Returns False where they are not finite, and nothing has changed then.
        """
        for parameter, master in zip(self.parameters.values(), self.masters.values()):
            assert parameter.grad is not None  # it takes part in the loss
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), _CLIP)
        if not torch.isfinite(norm):
            return False
        self.adam.step()
        self.schedule.step()
        self.adam.zero_grad()  # their memory is the next backward pass's
        self._publish()
        return True

    def state(self) -> dict[str, Tensor]:
        """Weights and moments, in float32, by name."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"{name}.weight"] = master.contiguous()
            for moment in _MOMENTS:
                tensors[f"{name}.{moment}"] = self.adam.state[master][moment].contiguous()
        return tensors

    def restore(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Take up what `state` gave after `steps` steps."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"{name}.weight"])
            moments = {key: tensors[f"{name}.{key}"].to(master.device) for key in _MOMENTS}
            count = torch.tensor(float(steps), device=master.device)
            self.adam.state[master] = {"step": count, **moments}
        self._schedule_after(steps)
        self._publish()

    def _schedule_after(self, done: int) -> None:
        """Schedule the steps that follow `done` ones; Transformers' first step would have rate 0.

        >>> adam = ScaledAdam({"weight": torch.ones(1)}, learning_rate=1.0, steps=100)
        >>> rates = []
        >>> for done in (0, 9, 54, 99):
        ...     adam._schedule_after(done)
        ...     rates.append(round(adam.adam.param_groups[0]["lr"], 2))
        >>> rates
        [0.1, 1.0, 0.51, 0.0]
        """
        warmup = max(1, round(_WARMUP * self.steps))
        self.schedule = get_cosine_schedule_with_warmup(
            self.adam, warmup, self.steps + 1, last_epoch=done
        )

    @torch.no_grad()
    def _publish(self) -> None:
        for parameter, master in zip(self.parameters.values(), self.masters.values()):
            parameter.copy_(master)

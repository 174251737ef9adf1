"""AdamW whose moments of compressed layers are compressed, and whose update is that of the dense ones."""

import torch
from torch import Tensor, nn


def velora_adamw(kind: type, options: dict, optim: str, moments: str) -> tuple[type, dict]:
    """
    Class and options in place of those that the Trainer has found for `optim`.

    Raises:
        ValueError: it is another optimizer than AdamW.
    """
    if kind is not torch.optim.AdamW:
        raise ValueError(f"compressed_state=True needs AdamW, got optim={optim!r}. Set optim='adamw_torch'.")
    return VeloraAdamW, {**options, "moments": moments}


class VeloraAdamW(torch.optim.AdamW):
    """
    [`torch.optim.AdamW`] for a model with `VeloraConfig(compressed_state=True)`.

    The gradient of a compressed weight is `C (x) v` with a fixed `v`, so that its moments are `m (x) v` and
    `s (x) v^2`: only `m` and `s`, of the shape of `C`, are kept, and

        W <- (1 - lr weight_decay) W - lr m^ (x) v / (sqrt(s^) (x) |v| + eps)

    equals AdamW on the dense gradient to rounding. All other parameters are torch's own. One layer at a time, the
    update itself takes memory of the weight's size.

    Args:
        params (`Iterable`): the trained parameters of the attached model: `velora_gradient` in place of `weight`.
        moments (`str`, *optional*, defaults to `"transport"`):
            When directions change: `"transport"` (multiplies moments by the cosine, and its square) or `"reset"`.
        kwargs: what [`torch.optim.AdamW`] takes, but for `amsgrad` and `maximize`.

    Raises:
        ValueError: `amsgrad` or `maximize` is asked for.
    """

    def __init__(self, params, *args, moments: str = "transport", **kwargs):
        for name in ("amsgrad", "maximize"):
            if kwargs.get(name):
                raise ValueError(f"VeloraAdamW does not support {name}={kwargs[name]}. Leave it out.")
        super().__init__(params, *args, **kwargs)
        self.moments = moments
        # a fused AdamW looks for overflows itself, which the compressed update does not: the scaler shall
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        """As in [`torch.optim.AdamW`]."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if hasattr(parameter, "velora_module") and parameter.grad is not None:
                    self._update(parameter, group)
                    held.append((parameter, parameter.grad))
                    parameter.grad = None  # torch's step leaves out what has none
        super().step()
        for parameter, grad in held:
            parameter.grad = grad
        return loss

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        module, state = parameter.velora_module, self.state[parameter]
        projector = module.velora_input.projector
        if not state:
            # torch's own names, so that checkpoints and tools know them
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["velora_version"] = projector.version
        elif state["velora_version"] != projector.version:
            self._follow(state, projector.overlap)
            state["velora_version"] = projector.version
        beta1, beta2 = group["betas"]
        state["step"] += 1
        first, second, count = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
        first.lerp_(parameter.grad, 1 - beta1)
        second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        rate = float(group["lr"])
        weight, v = module.weight, projector.directions[0].to(module.weight.dtype)
        root = (second / (1 - beta2**count)).sqrt_()
        denominator = projector.spread(root).mul_(v.abs()).add_(group["eps"])
        weight.mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(projector.spread(first).mul_(v), denominator, value=-rate / (1 - beta1**count))

    def _follow(self, state: dict, overlap: Tensor) -> None:
        """Moments along the old directions become those along the new ones."""
        if self.moments == "reset":
            state["step"].zero_()
            overlap = torch.zeros_like(overlap)
        overlap = overlap.to(state["exp_avg"].dtype)
        state["exp_avg"].mul_(overlap)
        state["exp_avg_sq"].mul_(overlap.square())

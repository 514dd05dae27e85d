"""Optimisation: LARS (the paper), AdamW, SGD; a gradient that is not finite drops its step; the learning rate."""

import math

import torch
from torch.optim.sgd import sgd

from support.errors import BadInput


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each weight is scaled by trust |w| / |g + wd w| (You et al. [91]).

    Batch norm and biases (one dimension) get neither the scaling nor weight decay.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        params = list(params)
        groups = [{"params": [p for p in params if p.ndim > 1], "adapt": True},
                  {"params": [p for p in params if p.ndim <= 1], "adapt": False}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            update = [p.grad for p in params]
            if group["adapt"]:
                # in the parameters' order of memory, which the fused kernel takes for granted
                update = torch._foreach_mul(params, group["weight_decay"])
                torch._foreach_add_(update, [p.grad for p in params])
                w, g = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(update))
                ratio = torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                torch._foreach_mul_(update, list(ratio.unbind()))
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            sgd(params, update, [self.state[p]["momentum"] for p in params], fused=True,
                found_inf=getattr(self, "found_inf", None), lr=group["lr"], momentum=group["momentum"],
                weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False)


class _Fused:
    """torch's fused kernels heed `found_inf`; `fused` of a checkpoint by an unfused optimizer is not taken over."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "param_groups": [{**g, "fused": True} for g in state["param_groups"]]})


class AdamW(_Fused, torch.optim.AdamW):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True)


class Adam(_Fused, torch.optim.Adam):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay=weight_decay, fused=True)


class SGD(_Fused, torch.optim.SGD):
    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=True)

    def step(self):
        """Momenta begin as 0: torch's would be undefined where the first step is dropped."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        super().step()


@torch.no_grad()
def step_if_finite(optimizer):
    """A step of one of these optimizers, unless a gradient is not finite: then parameters and the optimizer's state
    keep their bits -> whether all were finite, a bool tensor on their device.

    Nothing waits for the device: the fused kernels read the answer there, the caller when it logs.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = torch.stack(torch._foreach_norm(grads)).sum().isfinite()
    optimizer.found_inf = (~finite).to(torch.float32)  # the name that torch's GradScaler gives it
    optimizer.step()
    return finite


def last_good(file):
    """What an error message says of the checkpoint `file`."""
    return f"{file} is the last good checkpoint" if file.exists() else "nothing had been saved"


def check_weights(net, step, file):
    """Before a checkpoint: raise BadInput if a parameter or a buffer is not finite."""
    floats = {name: w for name, w in net.state_dict().items() if w.is_floating_point()}
    finite = torch.stack([w.isfinite().all() for w in floats.values()]).tolist()
    if bad := [name for name, good in zip(floats, finite, strict=True) if not good]:
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise BadInput(f"step {step} is not saved: {bad[0]}{more} not finite; {last_good(file)}. Likely causes: a "
                       f"learning rate too high (--lr), damaged weights")


def set_rate(optimizer, lr):
    """Of every group of parameters, times the group's `scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)


def learning_rate(step, steps_per_epoch, s):
    """Linear warm-up from lr_start to lr, then a cosine to lr_end (section 4); `step` counts from 0."""
    warm, total = s.warmup_epochs * steps_per_epoch, s.epochs * steps_per_epoch
    if step < warm:
        return s.lr_start + (s.lr - s.lr_start) * step / warm
    done = (step - warm) / max(1, total - warm - 1)
    return s.lr_end + (s.lr - s.lr_end) * (1 + math.cos(math.pi * done)) / 2


def rate_rule(s, batch):
    """The learning rate in words, for the plan."""
    rule = f"--lr {s.lr:.4g}"
    if s.optimizer == "lars" and s.lr == scaled_rate(batch):
        rule = f"4.8 at a batch of 640, scaled by sqrt({batch}/640)"
    return (f"learning rate ({s.optimizer}): {rule}; {s.lr_start:.4g} -> {s.lr:.4g} in {s.warmup_epochs} epochs, then "
            f"a cosine to {s.lr_end:.4g}")


def scaled_rate(batch):
    """The paper's learning rate, 4.8 for 640 videos, for other batches."""
    return 4.8 * math.sqrt(batch / 640)

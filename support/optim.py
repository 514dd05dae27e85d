"""Optimisation: LARS (the paper), AdamW, steps that a gradient which is not finite leaves out, the learning rate."""

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


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which heeds `found_inf`."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True)

    def load_state_dict(self, state):
        """Also of a checkpoint by the unfused one."""
        super().load_state_dict({**state, "param_groups": [{**g, "fused": True} for g in state["param_groups"]]})


@torch.no_grad()
def step_if_finite(optimizer):
    """A step of LARS or AdamW, unless a gradient is not finite: then parameters and the optimizer's state keep their
    bits -> whether all were finite, a bool tensor on their device.

    Nothing waits for the device: the fused kernels read the answer there, the caller when it logs.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = torch.stack(torch._foreach_norm(grads)).sum().isfinite()
    optimizer.found_inf = (~finite).to(torch.float32)  # the name that torch's GradScaler gives it
    optimizer.step()
    return finite


def check_weights(net, step, out):
    """Before a checkpoint: raise BadInput if a parameter or a buffer is not finite."""
    floats = {name: w for name, w in net.state_dict().items() if w.is_floating_point()}
    finite = torch.stack([w.isfinite().all() for w in floats.values()]).tolist()
    if bad := [name for name, good in zip(floats, finite, strict=True) if not good]:
        kept = f"{out} keeps the last good checkpoint" if (out / "checkpoint.pt").exists() else "nothing had been saved"
        more = f" and {len(bad) - 1} more" if bad[1:] else ""
        raise BadInput(f"step {step} is not saved: {bad[0]}{more} not finite; {kept}. Likely causes: a learning "
                       f"rate too high (--lr), damaged weights")


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

"""Stand-ins on the CPU for torch's kernels of batch norm on GPUs, and our batch norm of several processes on them."""

import copy

import torch
import torch.distributed as dist

from support import batch_norm


def sums(x):
    return x.transpose(0, 1).flatten(1).sum(1)


def at(values, x):
    return values.view(-1, *[1] * (x.ndim - 2))


class GpuKernels:
    """What torch's kernels of these names give, on the CPU."""

    @staticmethod
    def batch_norm_stats(x, eps):
        mean = sums(x) / (x.numel() / x.shape[1])
        return mean, (sums((x - at(mean, x)) ** 2) / (x.numel() / x.shape[1]) + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
        share, total = (counts / counts.sum())[:, None], counts.sum()
        mean = (share * means).sum(0)
        var = (share * (invstds ** -2 - eps + (means - mean) ** 2)).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * total / (total - 1), momentum)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
        return (x - at(mean, x)) * at(invstd * weight, x) + at(bias, x)

    @staticmethod
    def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *wanted):
        of_grad, with_x = sums(grad), sums(grad * (x - at(mean, x)))
        return of_grad, with_x, with_x * invstd, of_grad

    @staticmethod
    def batch_norm_backward_elemt(grad, x, mean, invstd, weight, of_grad, with_x, counts):
        assert counts.dtype == torch.int32
        inner = at(of_grad, x) + (x - at(mean, x)) * at(invstd ** 2 * with_x, x)
        return (grad - inner / counts.sum()) * at(invstd * weight, x)


def gpu_batch_norm(rows):
    """Two steps of processes with `rows` samples each against one process with all, in float64."""
    for name in vars(GpuKernels):
        if name.startswith("batch_norm"):
            setattr(torch, name, getattr(GpuKernels, name))
    dist.init_process_group("gloo")
    rank, g = dist.get_rank(), torch.Generator().manual_seed(0)
    own = slice(sum(rows[:rank]), sum(rows[:rank + 1]))
    for shape in ((5,), (5, 2, 3, 3)):
        one = torch.nn.BatchNorm3d(5).double() if len(shape) > 1 else torch.nn.BatchNorm1d(5).double()
        torch.nn.init.normal_(one.weight, generator=g), torch.nn.init.normal_(one.bias, generator=g)
        shared = copy.deepcopy(one)
        for _ in range(2):
            x, weight = (torch.randn(sum(rows), *shape, dtype=torch.float64, generator=g) for _ in range(2))
            whole, part = x.clone().requires_grad_(), x[own].clone().requires_grad_()
            expected = one(whole)
            (expected * weight).sum().backward()
            y = batch_norm._NormaliseOnGpu.apply(part, shared.weight, shared.bias, shared.running_mean,
                                                 shared.running_var, shared.momentum, shared.eps)
            (y * weight[own]).sum().backward()
            torch.testing.assert_close(y, expected[own])
            torch.testing.assert_close(part.grad, whole.grad[own])
        for a, b in zip(shared.parameters(), one.parameters(), strict=True):
            dist.all_reduce(a.grad)
            torch.testing.assert_close(a.grad, b.grad)
        torch.testing.assert_close(shared.running_mean, one.running_mean)
        torch.testing.assert_close(shared.running_var, one.running_var)

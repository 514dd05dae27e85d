"""Stand-ins on the CPU for torch's kernels of batch norm on GPUs."""

import torch


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

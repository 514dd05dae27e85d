"""Batch norm whose statistics are those of the whole batch, however many processes share it."""

import torch
import torch.distributed as dist
from torch import nn

from support.distributed import _gather_flat
from support.errors import BadInput


class _Normalise(torch.autograd.Function):
    """Batch norm by the statistics of all processes: one all-gather forward, one all-reduce backward.

    x [B, C, ...] of this process, of any B. -> normalised x, mean [C], biased variance [C], number of elements [1].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x, dims, correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / x.shape[1])])
        every = own.new_empty(dist.get_world_size(), len(own))
        dist.all_gather(list(every), own)
        means, variances, counts = every.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        # about the common mean (Chan et al.): nothing cancels, as in a difference of squares
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, total)
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, total

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var, total = ctx.saved_tensors
        # as if mean and variance were constants; the two sums over samples are the gradients of weight and bias
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dweight, dbias])
        dist.all_reduce(sums)
        # dx = weight / sigma (grad - mean(grad) - xhat mean(grad xhat)), xhat = (x - mean) / sigma
        sigma = (var + ctx.eps).sqrt()
        slope = -weight / sigma.square() * sums[0] / total
        shift = -weight / sigma * sums[1] / total - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return dx.add_(torch.addcmul(shift.view(shape), x, slope.view(shape))), dweight, dbias, None


class _NormaliseOnGpu(torch.autograd.Function):
    """The same by torch's kernels for GPUs, which read bfloat16 and sum in float32. Its SyncBatchNorm calls them too,
    but asks first which processes have no samples, and the host waits for the answer; here all have some.

    x [B, C, ...] of this process, of any B; the running statistics are updated. -> normalised x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = _dense(x)
        mean, invstd = torch.batch_norm_stats(x, eps)
        own = torch.cat([mean, invstd, mean.new_full((1,), x.numel() // x.shape[1])])
        every = own.new_empty(dist.get_world_size() * len(own))
        _gather_flat(every, own)
        means, invstds, counts = every.view(-1, len(own)).split([len(mean), len(mean), 1], dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum,
                                                                 eps, counts.flatten())
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = _dense(grad)
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, True, True, True)
        sums = torch.stack(sums)  # over this process's samples of grad, and of grad (x - mean)
        dist.all_reduce(sums)
        dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, *sums, counts)
        return dx, dweight, dbias, None, None, None, None


def _dense(x):
    """x as the kernels want it: channels last, or contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous()


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all processes' samples, without waiting for the device; each process has some."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if x.device.type == "cuda":
            self.num_batches_tracked.add_(1)
            return _NormaliseOnGpu.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum,
                                         self.eps)
        y, mean, var, total = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def synchronise_batch_norm(net, kind="own"):
    """Let every batch norm see the whole batch, as one process would -> net.

    kind: "own" (GlobalBatchNorm), or "torch" (torch.nn.SyncBatchNorm, for GPUs alone; the host waits in each layer).
    """
    if kind == "torch":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__class__ = GlobalBatchNorm  # same parameters and buffers
    return net


def synchronisation(flag, device):
    """--sync-batch-norm -> "own" or "torch". Own on CPUs; torch's on GPUs until ours has been measured there."""
    if flag == "torch" and device.type == "cpu":
        raise BadInput("--sync-batch-norm torch: torch.nn.SyncBatchNorm works on GPUs alone; take own, or auto")
    return flag if flag in ("own", "torch") else "torch" if device.type == "cuda" else "own"

"""The guided loss in the way of the released code, written from its description: the bench's baseline.

One Sinkhorn a call in the exp domain, the log-softmax again for each pair of crops, gradients by autograd.
"""

import torch


def exp_domain_sinkhorn(q, rounds):
    """Sinkhorn on exponentials, prototypes then samples each round; q [M, N] -> rows that sum to 1."""
    q = q.T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def exp_domain_loss(scores, lambda1=0.02, lambda2=0.03, rounds=3, assigning=2, temperature=0.1):
    """The guided loss crop by crop and pair by pair, scores [2, V, M, N]; the prior's sign is the paper's."""
    loss = 0
    for crop in range(assigning):
        with torch.no_grad():
            first = [exp_domain_sinkhorn((scores[view, crop] / lambda1).exp(), rounds) for view in range(2)]
            last = [exp_domain_sinkhorn(((scores[view, crop] + lambda2 * first[1 - view].log())
                                         / (lambda1 + lambda2)).exp(), rounds) for view in range(2)]
        for view in range(2):
            for other in set(range(scores.shape[1])) - {crop}:
                log_g = torch.log_softmax(scores[view, other] / temperature, dim=1)
                loss = loss - (last[view] * log_g).sum(1).mean()
    return loss / (2 * assigning * (scores.shape[1] - 1))

"""What experiments/scaling.py models, by hand, and what it records of a step."""

import pytest

from experiments import scaling
from experiments.bench import step as bench_step


@pytest.mark.parametrize(("kind", "n", "gpus", "microseconds"), [
    # one node: 7 hops over NVLink
    ("all-gather", 1000, 8, 3.6 + 7 * 0.47 + 7 * 1000 / 450e3),
    ("all-reduce", 1000, 8, 3.6 + 2 * 7 * 0.47 + 2 * 7 / 8 * 1000 / 450e3),  # ring 10.18, tree 11.68 us
    ("all-reduce", 10**9, 8, 3.6 + 2 * 7 * 0.47 + 2 * 7 / 8 * 10**9 / 450e3),
    # 8 nodes: 56 hops within and 7 between, or a tree of depth 3
    ("all-gather", 1000, 64, 3.6 + 56 * 0.846 + 7 * 2.7 + 63 * 1000 / 400e3),
    ("all-reduce", 1000, 64, 4.4 + 2 * 7 * 0.936 + 2 * 3 * 5.0 + 2 * 1000 / 400e3),  # tree 47.5, ring 136.2 us
    ("all-reduce", 10**10, 64, 3.6 + 2 * 56 * 0.846 + 2 * 7 * 2.7 + 2 * 63 / 64 * 10**10 / 400e3)])
def test_a_message_on_paper(kind, n, gpus, microseconds):
    assert scaling.modelled(kind, n, gpus) == pytest.approx(1e-6 * microseconds, rel=1e-9)


def test_a_table_adds_the_messages_of_a_kind():
    messages = [("features", "all-gather", 1000), ("batch norm", "all-reduce", 10), ("batch norm", "all-reduce", 20)]
    (row,) = scaling.model(messages, worlds=[64])
    assert row["gpus"] == 64 and row["features"] == round(1e3 * scaling.modelled("all-gather", 1000, 64), 2)
    assert row["batch norm"] == round(1e3 * sum(scaling.modelled("all-reduce", n, 64) for n in (10, 20)), 2)


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers", "ignore:(?s).*Grad strides do not match")
def test_a_step_sends_one_message_forward_and_one_back_for_each_batch_norm(monkeypatch):
    """312: of 2 views of 2 lengths of clips, 77 batch norms of S3D's each, and 2 of the head for each view."""
    full = bench_step.settings()
    small = type(full)(**{**vars(full), "width": 0.125, "hidden": 16})
    monkeypatch.setattr(scaling, "settings", lambda: small)
    messages = scaling.record(videos=2)
    counts = {}
    for what, kind, n in messages:
        counts.setdefault((what, kind), []).append(n)
    assert {k: len(v) for k, v in counts.items() if k[0] == "batch norm"} == {
        ("batch norm", "all-gather"): 312, ("batch norm", "all-reduce"): 312}
    d = 128
    assert counts["features", "all-gather"] == [2 * 2 * 2 * d * 4]  # views, crops, videos; float32
    net, _ = bench_step.network(small, scaling.torch.device("cpu"), scaling.torch.channels_last_3d)
    assert sum(counts["gradients", "all-reduce"]) == 4 * sum(p.numel() for p in net.parameters())
    # mean, variance and count of every channel forth, two sums of it back
    forth, back = counts["batch norm", "all-gather"], counts["batch norm", "all-reduce"]
    assert sum(n - 4 for n in forth) == sum(back)

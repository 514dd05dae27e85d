"""What a step keeps in memory, reckoned by a plan."""

import pytest
import torch
from helpers.training import run, settings
from torch.autograd.graph import saved_tensors_hooks

import model
from support import memory
from support.errors import BadInput

SMALL = {"arch": "r2plus1d18", "width": 0.125, "hidden": 32, "frames": 8, "short_frames": 4, "short_crops": 1,
         "size": 24}


def really_kept(s, prototypes, videos):
    """Bytes of what the forward pass of real clips keeps beside the network."""
    net, kept = model.two_view(vars(s), prototypes).train(), {}
    for backbone in net.backbones.values():
        backbone.recompute = s.recompute

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    clips = [{v: torch.randn(videos, crops, model.CHANNELS[v], frames, s.size, s.size) for v in s.views}
             for crops, frames in ((2, s.frames), (s.short_crops, s.short_frames)) if crops]
    with saved_tensors_hooks(keep, lambda t: t):
        net(clips, "flow" if s.method == "vicc" else None)
    for t in (*net.parameters(), *net.buffers()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("changes", [
    {}, {"short_crops": 0}, {"arch": "s3d", "frames": 16, "short_frames": 8, "size": 32}, {"recompute": True},
    {"views": ("flow",)}, {"method": "vicc"}])
def test_the_activations_of_a_step_are_known_before_it(changes):
    s, prototypes = settings(**{**SMALL, **changes}), torch.eye(24)
    assert 4 * memory.activation_bytes(s, prototypes) == pytest.approx(really_kept(s, prototypes, 4), rel=0.02)


def test_a_plan_says_what_a_step_keeps_and_refuses_what_does_not_fit(tiny, tmp_path, capsys, monkeypatch):
    assert run(tiny, tmp_path / "run", "--plan") == 0
    assert "a step keeps 0." in capsys.readouterr().out
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e6)
    with pytest.raises(BadInput, match=r"out of memory: a step keeps \d\.\d GB of activations, and 0\.0 GB are free, "
                                       r"with --batch-size 10, .*--recompute"):
        run(tiny, tmp_path / "run", "--plan")
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    assert run(tiny, tmp_path / "run", "--plan") == 0
    assert "free" not in capsys.readouterr().out


def test_a_run_that_may_not_fit_says_so_before_it_is_killed(tiny, tmp_path, capsys, monkeypatch):
    words = "warning: a step keeps 0.0 GB of activations, and 0.0 GB are free: the system may end this run without"
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e6)
    assert run(tiny, tmp_path / "run", "--epochs", "1") == 0  # there may be swap
    out = capsys.readouterr().out
    assert out.count(words) == 1 and "(status 137), with --batch-size 10, " in out
    for free in (1e9, 1e12, None):  # reckoned and fits; clips too small to be reckoned; not known
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        assert run(tiny, tmp_path / f"run{free}", "--epochs", "1") == 0 and "warning" not in capsys.readouterr().out


def test_clips_that_are_not_reckoned_keep_less_than_a_thousand_times_their_bytes():
    for arch in ("s3d", "r2plus1d18"):
        s = settings(arch=arch, width=1, hidden=256, frames=16, size=64, short_crops=0)
        clips = 4 * 2 * 16 * 64 ** 2 * (3 + 2)
        assert memory.activation_bytes(s, torch.eye(24)) < 1000 / 2 * clips


def test_a_container_has_what_its_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", str(tmp_path))
    machine = memory.free_bytes()
    if machine is None:
        pytest.skip("this system has no /proc/meminfo")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\nactive_file 100\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 1000
    (tmp_path / "memory.max").write_text("1500\n")
    assert memory.free_bytes() == 500 + 400  # the cache of files gives way

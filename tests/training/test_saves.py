"""How files are saved: rotation, order on the disk, versions, rights, sizes; what a smaller frame is."""

import json
import os

import cv2
import numpy as np
import pytest
import torch

from support.avi import AviWriter, write_avi
from support.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint, save_run
from support.errors import BadInput
from support.files import load_arrays, save_arrays
from support.stores import shrink


def steps(out):
    return {p.name: torch.load(p, weights_only=True)["step"] for p in out.glob("*.pt")}


def test_checkpoints_move_up_and_the_oldest_goes(tmp_path):
    for step in range(1, 7):
        save_run(tmp_path, {"step": step}, keep=4)
        names = ["checkpoint.pt", *(f"checkpoint.{k}.pt" for k in (1, 2, 3))]
        assert steps(tmp_path) == {name: step - k for k, name in enumerate(names) if step > k}
    (tmp_path / "one").mkdir()
    for step in (1, 2):
        save_run(tmp_path / "one", {"step": step}, keep=1)
        assert steps(tmp_path / "one") == {"checkpoint.pt": step}


def test_the_checkpoint_before_is_the_one_of_the_least_number(tmp_path, capsys):
    for k in (2, 10, 9):
        save_checkpoint(tmp_path / f"checkpoint.{k}.pt", {"step": 100 - k})
    for name in ("checkpoint.pt", "checkpoint.new.pt"):  # damaged, and half written: no checkpoint of a run
        (tmp_path / name).write_bytes(b"half")
    assert last_checkpoint(tmp_path)["step"] == 98
    (tmp_path / "checkpoint.2.pt").write_bytes(b"half")
    assert last_checkpoint(tmp_path)["step"] == 91
    assert capsys.readouterr().err.count("taking the checkpoint before it") == 2 + 3


@pytest.mark.parametrize("header", [{"kind": "checkpoint", "version": 2}, {"kind": "checkpoint"},
                                    {"kind": "weights", "version": 1}])
def test_a_checkpoint_of_another_kind_or_version_is_refused(tmp_path, header):
    torch.save({**header, "step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="is no checkpoint of this project"):
        load_checkpoint(tmp_path)


def test_arrays_of_another_version_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", header=np.array(json.dumps({"kind": "features", "version": 2})), x=np.zeros(3))
    with pytest.raises(BadInput, match="holds features version 2, but features version 1 is needed"):
        load_arrays(tmp_path / "x.npz", "features", "cmd")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_what_is_written_has_the_rights_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_arrays(tmp_path / "x.npz", "features", {}, x=np.zeros(3))
        assert os.umask(umask) == umask  # and leaves the process's own as they were
    finally:
        os.umask(before)
    assert (tmp_path / "x.npz").stat().st_mode & 0o777 == mode


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """What is synchronised is what is renamed, whole; of a run's checkpoints the newest gets its name last."""
    done, content = [], {}

    def fsync(fd, real=os.fsync):
        content[os.fstat(fd).st_ino] = os.fstat(fd).st_size
        real(fd)

    def replace(source, target, real=os.replace):
        at = os.stat(source)
        done.append((os.path.basename(target), content.get(at.st_ino) == at.st_size > 0))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_arrays(tmp_path / "x.npz", "features", {}, x=np.zeros(300))
    save_run(tmp_path, {"step": 1}, keep=2)
    write_avi(tmp_path / "x.avi", [np.zeros((16, 16), np.uint8)], {})
    assert done == [("x.npz", True), ("checkpoint.new.pt", True), ("checkpoint.pt", True), ("x.avi", True)]


class Long(bytes):
    """A JPEG of 1 GB, as it says."""

    def __len__(self):
        return 2**30


def test_a_film_beyond_4_gb_is_refused_before_it_is_written(tmp_path):
    writer = AviWriter()
    writer.size, writer.jpegs = (16, 16), [Long()] * 4
    with pytest.raises(BadInput, match=r"x\.avi would pass the 4 GB of an AVI file"):
        writer.write(tmp_path / "x.avi", {})
    assert not list(tmp_path.iterdir())
    writer.jpegs.pop()
    writer.write(tmp_path / "x.avi", {})
    assert (tmp_path / "x.avi").stat().st_size > 0


def test_a_smaller_frame_is_the_mean_of_its_area():
    frame = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    by_area = cv2.resize(frame, (30, 20), interpolation=cv2.INTER_AREA)
    assert np.array_equal(shrink(frame, 20), by_area)
    mean = frame.reshape(20, 3, 30, 3, 3).mean((1, 3))
    assert np.abs(shrink(frame, 20) - mean).max() <= 0.5 + 1e-6
    assert shrink(frame, 45).shape == (45, 68, 3)

"""flow.py import: flow that others extracted comes into a store as it was meant, and what doesn't fit is named."""

import json
import shutil

import cv2
import numpy as np
import pytest
from helpers.flow import command, film, moving, tree

import flow
from support.avi import AviReader
from support.errors import BadInput
from support.stores import FlowStore, dequantise


def write_image(path, component, bound=20, size=(24, 32)):
    """A component of flow, px or a plane of px, as denseflow writes it."""
    plane = np.broadcast_to(np.float32(component), size)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.rint(255 * (np.clip(plane, -bound, bound) + bound) / (2 * bound)).astype(np.uint8)
    assert cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])


def write_flow(root, name, flows, layout="denseflow", first=1, **more):
    for k, (u, v) in enumerate(flows, first):
        files = {"denseflow": (f"{name}/flow_x_{k:05d}.jpg", f"{name}/flow_y_{k:05d}.jpg"),
                 "uv": (f"u/{name}/frame{k:06d}.jpg", f"v/{name}/frame{k:06d}.jpg")}[layout]
        for component, file in zip((u, v), files, strict=True):
            write_image(root / file, component, **more)


def import_from(root, out, layout="denseflow", *more):
    return flow.main(["import", "--from", str(root), "--out", str(out), "--layout", layout, "--workers", "2", *more])


FLOWS = [(2.0, -1.0), (0.0, 0.0), (19.9, -19.9), (-7.5, 3.25)]


@pytest.mark.parametrize("layout", ["denseflow", "uv"])
@pytest.mark.parametrize("bound", [20, 32])
def test_values_are_those_that_were_extracted(tmp_path, layout, bound):
    """In order, u over v, within half a step of the images and half of the store's."""
    write_flow(tmp_path / "in", "a/x", [*FLOWS, (25.0, -25.0)], layout, bound=bound)
    assert import_from(tmp_path / "in", tmp_path / "s", layout, "--bound", str(bound)) == 0
    store = FlowStore(tmp_path / "s")
    assert store.header["method"] == f"imported from {layout}" and store.header["backend"] == layout
    assert store.header["imported_bound"] == bound and store.header["bound"] == 20
    planes = dequantise(np.stack(store.open("a/x").read(range(5))))
    assert planes.shape == (5, 48, 32)
    for plane, (u, v) in zip(planes, [*FLOWS, (20.0, -20.0)], strict=True):
        assert np.abs(plane[:24] - u).max() <= bound / 255 + 10 / 127 + 1e-4
        assert np.abs(plane[24:] - v).max() <= bound / 255 + 10 / 127 + 1e-4


def test_a_field_keeps_its_shape(tmp_path):
    x, y = np.meshgrid(np.linspace(-15, 15, 40), np.linspace(-10, 10, 30))
    write_flow(tmp_path / "in", "x", [(x, y)], size=(30, 40))
    assert import_from(tmp_path / "in", tmp_path / "s") == 0
    u, v = np.split(dequantise(FlowStore(tmp_path / "s").open("x").read([0])[0]), 2)
    assert np.abs(u - x).mean() < 0.15 and np.abs(v - y).mean() < 0.15


def test_what_does_not_fit_is_named_and_costs_itself_alone(tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("good", "fewer", "gap", "wide", "text"):
        write_flow(root, name, FLOWS)
    (root / "fewer" / "flow_y_00004.jpg").unlink()
    for side in "xy":
        (root / "gap" / f"flow_{side}_00002.jpg").unlink()
    write_image(root / "wide" / "flow_y_00003.jpg", 1.0, size=(24, 40))
    (root / "text" / "flow_x_00002.jpg").write_text("no image")
    assert import_from(root, tmp_path / "s") == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert skipped.keys() == {"fewer", "gap", "wide", "text"}
    assert "fewer holds 4 images of u, but 3 of v, 1 to 4 against, 1 to 3" in skipped["fewer"]
    assert "gap has gaps: its flow_x_ images run from 1 to 4, but 2 is missing" in skipped["gap"]
    assert "flow_y_00003.jpg is 40x24 px, but" in skipped["wide"] and "is 32x24" in skipped["wide"]
    assert "flow_x_00002.jpg is no image" in skipped["text"]
    assert "1 videos written; 4 skipped" in capsys.readouterr().out
    assert sorted(tree(tmp_path / "s")) == ["good.avi", "header.json", "skipped.json"]
    assert import_from(root, tmp_path / "s", "denseflow", "--strict") == 1
    for name in ("fewer", "gap", "wide", "text"):
        shutil.rmtree(root / name)
        write_flow(root, name, FLOWS)
    assert import_from(root, tmp_path / "s", "denseflow", "--strict") == 0
    assert not (tmp_path / "s" / "skipped.json").exists()


def test_counts_are_held_to_the_videos(tmp_path, capsys):
    """A video of n frames has n-1 flow fields; what it lacks on either side is named."""
    for name, n in (("fits", 5), ("a/other", 7), ("lacks", 3)):
        film(tmp_path / "v" / f"{name}.avi", moving(n, 24, 32, 1, 0))
    for name in ("fits", "a/other", "nobody"):
        write_flow(tmp_path / "in", name, FLOWS)
    (tmp_path / "v" / "a.xyz").touch()
    more = ["--videos", str(tmp_path / "v")]
    assert import_from(tmp_path / "in", tmp_path / "s", "denseflow", *more) == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert skipped.keys() == {"a/other", "nobody"}
    assert "a/other holds 4 flow fields, but" in skipped["a/other"] and "has 7 frames, to which 6" in skipped["a/other"]
    assert "nobody has no video of that name" in skipped["nobody"]
    assert "1 videos below" in (said := capsys.readouterr().out) and "have no flow below" in said and "lacks" in said
    assert "passed over: 1 files" in said
    assert flow.main(["info", str(tmp_path / "s"), *more]) == 0 and "passed over: 1 files" in capsys.readouterr().out
    header = FlowStore(tmp_path / "s").open("fits").header
    assert header["source_bytes"] == (tmp_path / "v" / "fits.avi").stat().st_size and header["source_frames"] == 5
    assert import_from(tmp_path / "in", tmp_path / "s", "denseflow", *more, "--strict") == 1


def test_again_makes_what_is_new_changed_or_damaged(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write_flow(tmp_path / "in", name, FLOWS)
    assert import_from(tmp_path / "in", tmp_path / "s") == 0
    whole = tree(tmp_path / "s")
    capsys.readouterr()
    assert import_from(tmp_path / "in", tmp_path / "s") == 0
    assert "3 videos with flow" in (said := capsys.readouterr().out) and "0 to do" in said
    assert tree(tmp_path / "s") == whole
    (tmp_path / "s" / "a.avi").write_bytes(whole["a.avi"][:-50])
    write_flow(tmp_path / "in", "b", [*FLOWS, (1.0, 1.0)])
    assert import_from(tmp_path / "in", tmp_path / "s") == 0 and "2 to do" in capsys.readouterr().out
    assert tree(tmp_path / "s")["a.avi"] == whole["a.avi"] and len(AviReader(tmp_path / "s" / "b.avi")) == 5


def test_it_is_never_mixed(tmp_path):
    write_flow(tmp_path / "in", "x", FLOWS)
    write_flow(tmp_path / "uv", "x", FLOWS, "uv")
    film(tmp_path / "v" / "y.avi", moving(3, 24, 24, 1, 0))
    assert import_from(tmp_path / "in", tmp_path / "s") == 0
    with pytest.raises(BadInput, match=r"other settings \(method is imported from denseflow there and TV-L1 now\)"):
        command(tmp_path / "v", tmp_path / "s")
    with pytest.raises(BadInput, match=r"other settings \(imported_bound is 20\.0 there and 32\.0 now\)"):
        import_from(tmp_path / "in", tmp_path / "s", "denseflow", "--bound", "32")
    with pytest.raises(BadInput, match="method is imported from denseflow there and imported from uv now"):
        import_from(tmp_path / "uv", tmp_path / "s", "uv")
    assert command(tmp_path / "v", tmp_path / "t") == 0
    with pytest.raises(BadInput, match="method is TV-L1 there and imported from denseflow now"):
        import_from(tmp_path / "in", tmp_path / "t")


def test_bad_input_is_a_message(tmp_path):
    write_flow(tmp_path / "in", "x", FLOWS)
    write_flow(tmp_path / "uv", "x", FLOWS, "uv")
    with pytest.raises(BadInput, match=r"no flow in the layout uv .*; is it --layout denseflow \(NAME/flow_x_00001"):
        import_from(tmp_path / "in", tmp_path / "s", "uv")
    with pytest.raises(BadInput, match=r"no flow in the layout denseflow .*; is it --layout uv"):
        import_from(tmp_path / "uv", tmp_path / "s")
    with pytest.raises(BadInput, match="is no folder"):
        import_from(tmp_path / "nowhere", tmp_path / "s")
    with pytest.raises(BadInput, match=r"--bound takes the px .*, not 0"):
        import_from(tmp_path / "in", tmp_path / "s", "denseflow", "--bound", "0")
    with pytest.raises(BadInput, match="lie in one another"):
        import_from(tmp_path / "in", tmp_path / "in" / "s")
    shutil.rmtree(tmp_path / "uv" / "v" / "x")
    write_flow(tmp_path / "uv", "y", FLOWS, "uv")
    with pytest.raises(BadInput, match=r"u/x has no .*v/x beside it"):
        import_from(tmp_path / "uv", tmp_path / "s", "uv")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("layout", ["denseflow", "uv"])
def test_the_folder_of_one_video_is_not_the_folder_of_all(tmp_path, layout):
    write_flow(tmp_path / "flow", "." if layout == "uv" else "one", FLOWS, layout)
    source = tmp_path / "flow" / ("" if layout == "uv" else "one")
    with pytest.raises(BadInput, match="holds the flow of one video itself; put it into a folder of the video's name"):
        import_from(source, tmp_path / "s", layout)
    assert not (tmp_path / "s").exists()


def test_pictures_of_flow_are_no_flow(tmp_path):
    """In colours, as flow is drawn; the other video is taken."""
    write_flow(tmp_path / "flow", "good", FLOWS)
    write_flow(tmp_path / "flow", "drawn", FLOWS)
    colours = np.zeros((24, 32, 3), np.uint8)
    colours[..., 2] = 200
    cv2.imwrite(str(tmp_path / "flow" / "drawn" / "flow_x_00002.jpg"), colours)
    assert import_from(tmp_path / "flow", tmp_path / "s") == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert skipped.keys() == {"drawn"} and "flow_x_00002.jpg is in colour; u and v are read" in skipped["drawn"]
    assert "good" in FlowStore(tmp_path / "s")

"""experiments/bench: what it compares is the same, and what it prints it writes."""

import json
import re

import pytest
import torch

from experiments.bench import __main__ as bench
from experiments.bench import flow as bench_flow
from experiments.bench import loader as bench_loader
from experiments.bench import long_film as bench_long_film
from experiments.bench import prototypes as bench_prototypes
from experiments.bench import search as bench_search
from experiments.bench import step as bench_step
from experiments.bench.measure import in_turns, row
from support.errors import BadInput
from support.videos import find_videos


def test_both_trainers_of_the_step_have_one_loss_and_one_count_of_operations():
    """And they end with the bench, or their seconds would be counted in the next row."""
    with bench_step.trainers(torch.device("cpu"), (2, [(2, 8)], 32), ("--width", "0.25")) as pipes:
        (plain, flops, _), (loss, same, peak) = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
            assert pipe.recv() is None
    assert loss == pytest.approx(plain, rel=1e-3) and flops == pytest.approx(same, rel=5e-3) and peak > 0.1
    assert not bench_step.multiprocessing.active_children()


def test_the_loader_is_compared_on_the_same_films(tiny, monkeypatch, capsys):
    monkeypatch.setattr(bench_loader, "in_turns", lambda calls, *args, **kwargs: [1.0 for call in calls if call()])
    monkeypatch.setattr(bench_loader, "LONG", 2)
    videos = find_videos(tiny.videos / "Walk")
    rows = list(bench_loader.loader(torch.device("cpu"), tiny.videos / "Walk"))
    assert len(rows) == 8 and all("real clips" in r["case"] for r in rows[:7])
    assert "2 s of generated H.264" in rows[7]["case"] and all("key frames" in r["case"] for r in rows[6:])
    assert f"{len(videos)} real clips; samples a second" in capsys.readouterr().err
    assert all(r["ours_ms"] > 0 for r in rows[4:6])  # through a process: these are measured here too


def test_prototypes_are_measured():
    m = bench_prototypes.measure(8, 16, torch.device("cpu"))
    assert m["construction"] == "simplex" and m["mean"] == m["max"] == pytest.approx(-1 / 7, abs=1e-4)


def test_the_search_is_compared_with_faiss():
    """Both indices for one query and a hundred: what they cost and find stands in the row."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    rows = list(bench_search.search(torch.device("cpu"), None, sizes=(700,), dims=(16,)))
    assert len(rows) == 4 and all(r["baseline_ms"] > 0 and r["ours_ms"] > 0 for r in rows)
    assert [re.sub(r"[\d.]+", "#", r["case"]) for r in rows[:2]] == [
        "# nearest of #, # x #; FAISS flat, built in # s, # MiB more",
        "# nearest of #, # x #; FAISS IVF, # of # cells, recall #, built in # s, # MiB more"]


def test_the_parts_of_a_query_are_timed(tiny, monkeypatch, capsys):
    """Of a film of one's own; each part is there, and the whole is their sum."""
    parts = bench_search.query_parts
    monkeypatch.setattr(bench_search, "query_parts", lambda film: parts(film, 50, 1, width=0.125, frames=8, size=32))
    monkeypatch.setattr("sys.argv", ["bench", "--query", str(next(tiny.videos.rglob("*.avi")))])
    bench_search.main()
    seconds = re.search(r"decoding ([\d.]+) s, network ([\d.]+) s, search ([\d.]+) s, in all ([\d.]+) s",
                        capsys.readouterr().out).groups()
    *each, whole = map(float, seconds)
    assert min(each[:2]) > 0 and whole == pytest.approx(sum(each), abs=0.007)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "operator", "--device", "cuda"])
    with pytest.raises(BadInput, match="--device cuda: torch sees no NVIDIA GPU"):
        bench.main()


def test_rows_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROWS", {"x": lambda device, videos: [row("x", "a case", device, 6.0, 2.0,
                                                                         1.0)]})
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "rows.json"), "--device", "cpu"])
    bench.main()
    written, = json.loads((tmp_path / "rows.json").read_text())
    assert written == {"row": "x", "case": "a case", "device": "cpu", "threads": torch.get_num_threads(),
                       "baseline_ms": 6.0, "ours_ms": 2.0, "ratio": 3.0, "floor_ms": 1.0}
    assert "baseline 6.000 ms, ours 2.000 ms, 3.0x, floor 1.000 ms" in capsys.readouterr().out


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    def stopped(device, videos):
        yield row("x", "a case", device, 6.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "ROWS", {"x": stopped})
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "rows.json"), "--device", "cpu"])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert [r["case"] for r in json.loads((tmp_path / "rows.json").read_text())] == ["a case"]


def test_on_a_gpu_a_turn_is_many_calls_and_one_wait(monkeypatch):
    """With a clock that each call moves by 5 ms and each wait by 10."""
    now, waits, calls = [0.0], [], []

    def call():
        calls.append(0)
        now[0] += 0.005

    def wait(device):
        waits.append(len(calls))
        now[0] += 0.01

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    ms, = in_turns([call], torch.device("cuda"), seconds=0, least=3, clock=lambda: now[0])
    assert waits == [1, 2, 3, 4, 5] and ms == pytest.approx(15)  # 15 ms with its wait: one call fills a turn
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(calls)))
    calls.clear(), waits.clear()
    ms, = in_turns([call], torch.device("cuda"), seconds=0, least=3, clock=lambda: now[0])
    assert waits == [1, 2, 6, 10, 14] and ms == pytest.approx(5)
    calls.clear()
    in_turns([call], torch.device("cpu"), seconds=0, least=3, clock=lambda: now[0])
    assert len(calls) == 5


def test_no_row_of_the_flow_claims_a_floor(monkeypatch):
    monkeypatch.setattr(bench_flow, "in_turns", lambda calls, *args, **kwargs: [1.0 for _ in calls])
    monkeypatch.setattr(bench_flow.tvl1, "flow", lambda frames, **kwargs: torch.zeros(len(frames), 1, 2, 240, 320))
    monkeypatch.setattr(bench_flow, "NEAR", 9)
    monkeypatch.setattr(bench_flow, "faster_methods", lambda *args: ())
    rows = list(bench_flow.flow(torch.device("cpu"), None))
    assert rows[-1]["case"].startswith("100 iterations") and {r["floor_ms"] for r in rows} == {None}


def test_a_long_film_is_cut_and_sampled(tmp_path, monkeypatch, capsys):
    """Three segments of two seconds; what is printed is of them."""
    monkeypatch.setattr("sys.argv", ["bench", "--minutes", "0.1", "--segment", "2", "--workers", "1", "--keep",
                                     str(tmp_path)])
    monkeypatch.setattr(bench_long_film.samples_a_second, "__defaults__", (0.0, 1))
    bench_long_film.main()
    said = capsys.readouterr().out
    assert "\n0.1 minutes, 3 segments: flow.py " in said
    assert len(list((tmp_path / "0.1_minutes" / "flow").rglob("*.avi"))) == 3
    peak, rate, whole = map(float, re.search(r"peak (\d+) MB .* makes ([\d.]+) samples .* segments, ([\d.]+) of the",
                                             said).groups())
    assert 100 < peak < 1000 and rate > 0 and whole > 0
    with pytest.raises(BadInput, match="holds stores already"):
        bench_long_film.main()

"""The row of the bench that feeds the training: the loader.

From files to 2 long and 4 short clips of both views, S3D's sizes, one core. Baseline: the whole video and its whole
flow are decoded, and each frame of each clip goes through torch alone (resize, crop, flip, jitter, blur, normalise), as
the released code's transforms do; written from their description. The flow stored here is DIS, not TV-L1: only reading
it is timed. On the films of --videos, else on generated ones.

Ours from the videos and from a store of RGB, each with augmentation on the same core (a CPU's) and left to the training
device; and through a loader process, whose samples pass to the training process in shared memory: there the seconds of
both count. Seconds are those of the core, so that other work on the machine changes little.

The last rows are of the frames of a sample alone: begun at key frames wherever one lies between, against one pass from
the film's start; on the same films, and on two minutes of generated H.264.
"""

import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from unittest import mock

import av
import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

import data
from experiments import walkers
from experiments.bench.measure import in_turns, row
from support import flow_pipeline, seeking
from support.avi import write_avi
from support.datasets import Video
from support.epoch_batches import EpochBatches
from support.loader import keep_freed_memory, start_worker
from support.stores import FlowStore, RgbStore, quantise, rgb_settings, shrink
from support.videos import declared_frames, decode, find_videos, frames_at

SIZE, SCALE, LENGTHS = 128, (136, 190), [32, 32, 16, 16, 16, 16]
LONG = 120  # seconds


# ---------------------------------------------------------------------------------------------------------------------
# loader
# ---------------------------------------------------------------------------------------------------------------------
def dis_store(videos, root):
    """A flow store of cheap flow (DIS) at the real resolution -> FlowStore."""
    (root / "header.json").write_text('{"kind": "flow", "version": 1}')
    store = FlowStore(root)
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    for video in videos:
        grey = [flow_pipeline.grey(frame, 256) for frame in decode(video.path)]
        fields = (solver.calc(a, b, None) for a, b in pairwise(grey))
        write_avi(store.path(video.name), (quantise(np.concatenate([f[..., 0], f[..., 1]])) for f in fields),
                  {})
    return store


def rgb_store(videos, root):
    """A store of RGB as flow.py --rgb makes it -> RgbStore."""
    (root / "header.json").write_text(json.dumps({"kind": "rgb", "version": 1, **rgb_settings()}))
    store = RgbStore(root)
    side, quality = store.header["short_side"], store.header["quality"]
    for video in videos:
        write_avi(store.path(video.name), (shrink(f, side) for f in decode(video.path)), {},
                  quality=quality)
    return store


def fidelity(videos, plain, stored):
    """What the store of RGB costs, printed on standard error: bytes, and the difference of what it gives."""
    side, sizes, frames, squares, clips = stored.rgb.header["short_side"], [], 0, [], []
    for k, video in enumerate(videos):
        sizes.append(stored.rgb.path(video.name).stat().st_size)
        reader = stored.rgb.open(video.name)
        frames += len(reader)
        for frame, kept in zip(decode(video.path), reader.frames(range(0, 30)), strict=False):
            squares.append(((shrink(frame, side).astype(float) - kept) ** 2).mean())
        a, b = (c[(0, k)]["long"]["rgb"].float() for c in (plain, stored))
        clips.append((a - b).abs().mean().item())
    decibel = 10 * np.log10(255 ** 2 / np.mean(squares))
    print(f"store of RGB, {side} px: {sum(sizes) / frames / 1e3:.1f} kB a frame, {sum(sizes) / len(sizes) / 1e6:.2f} "
          f"MB a video, PSNR {decibel:.1f} dB of what is stored; a clip differs from the video's by "
          f"{np.mean(clips):.1f} of 255 levels on average", file=sys.stderr)


def jitter(x, brightness, contrast, saturation, hue):
    """Colour jitter of one frame [3, H, W] in 0..1, one operation after the other, each clamped."""
    grey = x.new_tensor(data.GREY).view(3, 1, 1)
    x = (x * brightness).clamp(0, 1)
    x = (x * contrast + (1 - contrast) * (x * grey).sum(0).mean()).clamp(0, 1)
    x = (x * saturation + (1 - saturation) * (x * grey).sum(0, keepdim=True)).clamp(0, 1)
    turn = data._colour_matrices(x.new_tensor([[0, 1, 1, 1, hue, 0]]))[0]
    return torch.einsum("ij,jhw->ihw", turn, x).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur of one frame [C, H, W], 13 taps an axis."""
    at = torch.arange(-6, 7, dtype=x.dtype)
    g = torch.exp(-at * at / (2 * sigma * sigma))
    g = (g / g.sum()).expand(len(x), 1, 1, -1)
    x = F.pad(x[None], (6, 6, 6, 6), mode="reflect")
    return F.conv2d(F.conv2d(x, g, groups=len(g)), g.transpose(2, 3), groups=len(g))[0]


def frame_by_frame(video, store, rng):
    """One sample in the baseline's way -> list of {view: [C, T, S, S]}."""
    rgb = [torch.from_numpy(cv2.cvtColor(f, cv2.COLOR_BGR2RGB)).permute(2, 0, 1) for f in decode(video.path)]
    reader = store.open(video.name)
    planes = [torch.from_numpy(np.stack(np.split(p, 2))) for p in reader.read(range(len(reader)))]
    clips = []
    for frames in LENGTHS:
        n = len(planes)
        start, short = int(rng.integers(max(1, n - frames + 1))), int(rng.uniform(*SCALE))
        place, flip, strength = rng.uniform(size=2), rng.uniform() < 0.5, rng.uniform(0.6, 1.4, 3)
        jittered, sigma = rng.uniform() < 0.8, rng.uniform(0.1, 2.0) if rng.uniform() < 0.5 else 0
        clip = {"rgb": [], "flow": []}
        for t in data.clip_indices(start, frames, 1, n):
            for view, source in (("rgb", rgb), ("flow", planes)):
                x = source[t].float() / 255 if view == "rgb" else (source[t].float() - 128) / 127
                scale = short / min(x.shape[1:])
                size = [max(SIZE, round(side * scale)) for side in x.shape[1:]]
                x = F.interpolate(x[None], size=size, mode="bilinear")[0]
                top, left = (int((side - SIZE) * p) for side, p in zip(x.shape[1:], place, strict=True))
                x = x[:, top:top + SIZE, left:left + SIZE]
                x = x.flip(-1) if flip else x
                if view == "rgb":
                    x = jitter(x, *strength, 0.05) if jittered else x
                    x = blur(x, sigma) if sigma else x
                    x = (x - x.new_tensor(data.MEAN).view(3, 1, 1)) / x.new_tensor(data.STD).view(3, 1, 1)
                clip[view].append(x)
        clips.append({view: torch.stack(frames_, dim=1) for view, frames_ in clip.items()})
    return clips


def real_or_generated(videos, folder):
    """Films to load -> (list of Video, what they are)."""
    if videos:
        return [Video(path, name, 0) for name, path in find_videos(videos).items()], "real clips"
    walkers.make(folder / "films", train=4, test=1, size=240, frames=150)
    films = walkers.clips(folder / "films", "train")
    return [Video(str(path), path.stem, 0) for path, _ in films], "generated films of 240 px"


def through_a_process(clips, rounds=10):
    """Milliseconds of a core a sample, in the loader process and in this one, which does nothing with it."""
    def spent():
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
        return time.process_time() + of_children.ru_utime + of_children.ru_stime

    n, start = len(clips), spent()
    batches = DataLoader(clips, batch_sampler=EpochBatches(n, n, rounds), num_workers=1,
                         worker_init_fn=start_worker)
    assert sum(len(batch["index"]) for batch in batches) == rounds * n
    return 1e3 * (spent() - start) / (rounds * n)


def long_film(path, seconds):
    """A moving texture in H.264, 320 x 180 at 25 frames a second, a key frame every 250."""
    big = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (580, 720, 3)).astype(np.uint8), (0, 0), 2)
    big = cv2.normalize(big, None, 0, 255, cv2.NORM_MINMAX)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        stream.options = {"preset": "veryfast", "x264-params": "keyint=250"}
        for t in range(25 * seconds):
            x, y = int(200 + 190 * np.sin(t / 90)), int(200 + 190 * np.cos(t / 130))
            picture = np.ascontiguousarray(big[y:y + 180, x:x + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode())


def from_key_frames(paths, device):
    """Milliseconds of a sample's frames: (in one pass, begun at key frames wherever one lies between)."""
    rng, wanted = np.random.default_rng(0), []
    for path in paths:
        starts = [(int(rng.integers(max(1, declared_frames(path) - frames))), frames) for frames in LENGTHS]
        wanted.append(sorted({t for start, frames in starts for t in range(start, start + frames)}))

    def read(far):
        with mock.patch.object(seeking, "FAR", far):
            return sum(1 for path, numbers in zip(paths, wanted, strict=True) for _ in frames_at(path, numbers))

    calls = [lambda: read(sys.maxsize), lambda: read(0)]
    return [ms / len(paths) for ms in in_turns(calls, device, seconds=10, clock=time.process_time)]


def loader(device, videos):
    """Samples a second and core: decode, cut, collate, augment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does; the baseline gains as well
    try:
        with tempfile.TemporaryDirectory() as folder:
            films, what = real_or_generated(videos, Path(folder))
            for name in ("flow", "rgb"):
                (Path(folder) / name).mkdir()
            store = dis_store(films, Path(folder) / "flow")
            sources = {"from the videos": data.TrainClips(films, store),
                       "from a store of RGB": data.TrainClips(films, store, rgb=rgb_store(films, Path(folder) / "rgb"))}
            fidelity(films, *sources.values())
            n = len(films)

            def loaded(clips, i):
                return default_collate([clips[(0, i)]])

            def baseline(i):
                out = frame_by_frame(films[i], store, np.random.default_rng(i))
                return [{view: x.to(device) for view, x in clip.items()} for clip in out]

            made = data.augment(loaded(sources["from the videos"], 0), device)
            assert sum(clip["rgb"].shape[1] for clip in made) == len(baseline(0)) == len(LENGTHS)
            calls = {"": baseline}
            for source, clips in sources.items():
                calls[f"{source}, augmented on the same core"] = lambda i, c=clips: data.augment(loaded(c, i), "cpu")
                calls[f"{source}, augmentation left to the device"] = lambda i, c=clips: loaded(c, i)
            every = in_turns([lambda call=call: [call(i) for i in range(n)] for call in calls.values()], device,
                             seconds=25, clock=time.process_time)
            baseline_ms, *ours = (ms / n for ms in every)
            ours += [through_a_process(clips) for clips in sources.values()]
            long_film(Path(folder) / "long.mp4", LONG)
            sought = {what: from_key_frames([film.path for film in films], device),
                      f"{LONG} s of generated H.264": from_key_frames([Path(folder) / "long.mp4"], device)}
            cases = [*list(calls)[1:], *(f"{source}, through a loader process" for source in sources)]
    finally:
        torch.set_num_threads(threads)
    print(f"{len(films)} {what}; samples a second and core; cores that feed 95 a second:", file=sys.stderr)
    for case, ms in zip(cases, ours, strict=True):
        print(f"  {case}: {1e3 / ms:.1f}; {0.095 * ms:.1f}", file=sys.stderr)
        yield row("loader", f"2 x 32 + 4 x 16 frames of both views, {what}, one thread, {case}", device, baseline_ms,
                  ms)
    for what, (one_pass, ms) in sought.items():
        yield row("loader", f"2 x 32 + 4 x 16 frames of RGB alone, {what}, one thread, begun at key frames (baseline: "
                  f"one pass)", torch.device("cpu"), one_pass, ms)

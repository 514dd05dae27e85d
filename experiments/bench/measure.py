"""How the bench measures: on which device, calls in turns, the machine's own rates, and the form of a row."""

import statistics
import time

import torch

from support.errors import BadInput


def add_device(parser):
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def device_of(args):
    """--device -> torch.device. Raises BadInput where there is no such device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no NVIDIA GPU here")
    return torch.device(args.device)


GPU_TURN_MS = 20  # about, of each call on a GPU


def in_turns(calls, device, seconds=4.0, least=5, clock=time.perf_counter):
    """Median milliseconds of each call, taking turns for about `seconds` and at least `least` rounds.

    On a GPU a turn is as many calls as take some 20 ms, one after the other, and one wait for the device: as in
    training, where the host isn't made to wait after each.
    clock: time.process_time for what one core does by itself; the load of other jobs then changes little.
    """

    def turn(call, count):
        start = clock()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (clock() - start) / count

    counts = []
    for call in calls:  # warm-up: first calls allocate
        turn(call, 1)
        ms = turn(call, 1)
        counts.append(max(1, round(GPU_TURN_MS / ms)) if device.type == "cuda" else 1)
    times = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for call, count, ts in zip(calls, counts, times, strict=True):
            ts.append(turn(call, count))
    return [statistics.median(ts) for ts in times]


def machine_rates(device):
    """(bytes a second of a copy in memory, float32 exponentials a second on data in cache), with all threads."""
    source = torch.rand(2**25, device=device)
    target = torch.empty_like(source)
    small = torch.rand(2**17 if device.type == "cpu" else 2**22, device=device)
    copied, raised = in_turns([lambda: target.copy_(source), lambda: [torch.exp(small, out=target[:small.numel()])
                                                                      for _ in range(20)]], device, seconds=2)
    return 2 * 4 * source.numel() / (copied / 1e3), 20 * small.numel() / (raised / 1e3)


def row(name, case, device, baseline_ms, ours_ms, floor_ms=None):
    return {"row": name, "case": case, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "baseline_ms": round(baseline_ms, 4), "ours_ms": round(ours_ms, 4),
            "ratio": round(baseline_ms / ours_ms, 2), "floor_ms": None if floor_ms is None else round(floor_ms, 4)}

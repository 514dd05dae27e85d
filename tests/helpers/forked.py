"""Runs of the stages that are killed, starved, hung and shared, each in a fork of one process that imported all.

Started once a session (the fixture `forked`); a line of JSON in names a function below and its arguments, a line out is
its status. An assertion that fails prints its traceback. One thread: OpenMP's do not survive a fork.
"""

import faulthandler
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[k]) for k in (1, 2)]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (torch.optim would, in every fork)
import torch.distributed as dist  # noqa: E402
from helpers.gpu_kernels import gpu_batch_norm  # noqa: E402
from helpers.processes import LIMIT, before_each, end, fork, free_port, in_step, start_ranks, train  # noqa: E402
from helpers.read_only import make_read_only  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import flow  # noqa: E402
import goca  # noqa: E402
import model  # noqa: E402
import pretrain  # noqa: E402
import search  # noqa: E402
from support import classifiers, video_index  # noqa: E402
from support.batch_norm import synchronise_batch_norm  # noqa: E402
from support.checkpoints import load_checkpoint  # noqa: E402
from support.cli import command_line  # noqa: E402
from support.distributed import MaxOverRanks, data_parallel  # noqa: E402
from support.errors import BadInput  # noqa: E402
from support.optim import LARS  # noqa: E402
from support.training_log import Log  # noqa: E402


# --- SIGKILL ---------------------------------------------------------------------------------------------------------
def train_to_death(argv, moment, occurrence):
    """Train, and die by SIGKILL when `moment` comes for the n-th time."""
    seen = []

    def hook(name):
        seen.append(name)
        if name == moment and seen.count(name) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, owner, attribute in (("forward", pretrain, "step_loss"), ("update", LARS, "step"),
                                   ("log", Log, "line"), ("sync", os, "fsync"), ("rename", os, "replace"),
                                   ("link", os, "link"), ("unlink", Path, "unlink")):
        before_each(name, owner, attribute, hook)
    real = torch.save

    def save(state, file):  # half of it on the disk
        real(state, file)
        size = file.tell()
        file.truncate(size // 2)
        hook("half saved")
        file.seek(0)
        real(state, file)

    torch.save = save
    train(argv)


MOMENTS = ["before forward", "after forward", "before update", "after update", "before log", "after log", "before sync",
           "after sync", "before rename", "after rename", "before link", "after link", "before unlink", "after unlink",
           "half saved"]


def lines(out):
    """The log without what the machine says."""
    every = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    machine = "samples_per_s", "data_wait", "peak_gib"
    return [{k: v for k, v in line.items() if k not in machine} for line in every if "loss" in line]


def same(out, whole):
    """Assert that a run ended as an uninterrupted one: bits of the weights and the optimizer, lines of the log."""
    a, b = load_checkpoint(out), load_checkpoint(whole)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"]), out
    for i, state in b["optimizer"]["state"].items():
        assert all(torch.equal(a["optimizer"]["state"][i][k], state[k]) for k in state), out
    assert a["step"] == b["step"] and lines(out) == lines(whole), (lines(out), lines(whole))


def kills(argv, root, count, seed):
    """Kill runs `count` times, half at named moments and half at any time, and damage what they leave; each ends as one
    undisturbed."""
    rng, root = random.Random(seed), Path(root)
    began = time.monotonic()
    whole = fork(train, [*argv, "--out", f"{root}/whole", "--keep", "5"], said=root / "said")
    assert end(whole) == 0, (root / "said").read_text()
    seconds = time.monotonic() - began
    moments = rng.sample(MOMENTS, len(MOMENTS))
    done, runs, whole = [], 0, 0  # whole: runs that ended since the last was killed

    def check():
        same(root / str(runs), root / "whole")
        left = {p.name for p in (root / str(runs)).iterdir()} - {"checkpoint.new.pt", "checkpoint.damaged.pt"}
        assert left == {"checkpoint.pt", "checkpoint.1.pt", "log.jsonl", "lock"}, left

    def cut(file):
        file.write_bytes(file.read_bytes()[:-1000])

    def damage():
        """Cut the newest checkpoint, unless it is the only good one. Every second run begins so, from step 4."""
        out = root / str(runs)
        newest, before = out / "checkpoint.pt", out / "checkpoint.1.pt"
        if runs % 2 == 0 and not out.exists():
            out.mkdir()
            shutil.copyfile(root / "whole" / "checkpoint.2.pt", newest)
            shutil.copyfile(root / "whole" / "checkpoint.3.pt", before)
            shutil.copyfile(root / "whole" / "log.jsonl", out / "log.jsonl")
            cut(newest)
        elif rng.random() < 0.5:
            with suppress(BadInput):
                load_checkpoint(newest), load_checkpoint(before)
                cut(newest)

    while len(done) < count:
        command = [*argv, "--out", f"{root}/{runs}"]
        damage()
        if len(done) % 2 == 0:
            # first where a damaged newest would have taken the place of the good one
            moment = (moments[len(done) // 2 % len(moments)], rng.randint(1, 2)) if done else ("after link", 1)
            status = end(fork(train_to_death, command, *moment, said=root / "said"))
        else:
            moment = rng.uniform(0, seconds / 2)
            pid = fork(train, command, said=root / "said")
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
            status = end(pid)
        assert status in (-signal.SIGKILL, 0), (status, moment, (root / "said").read_text())
        if status == 0:
            check()
            runs, whole = runs + 1, whole + 1
            assert whole < 10, f"{moment} never came in {whole} runs"
        else:
            done.append(moment)
            whole = 0
    assert end(fork(train, [*argv, "--out", f"{root}/{runs}"], said=root / "said")) == 0, (root / "said").read_text()
    check()


# --- several processes -----------------------------------------------------------------------------------------------
def in_double():
    """Let all of pretrain.py compute in float64: a small network's float32 gradients have noise of some per cent."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    augment = data.augment
    data.augment = lambda batch, device: [{view: x.double() for view, x in clips.items()}
                                          for clips in augment(batch, device)]


def train_in_double(argv):
    in_double()
    train(argv)


def shares(argv, root, batch, worlds):
    """The same global batches in several numbers of processes, in float64: root/1, root/2, ..."""
    for world in worlds:
        command = [*argv, "--batch-size", str(batch // world), "--out", f"{root}/{world}"]
        for pid in start_ranks(world, train_in_double, command, said=f"{root}/said"):
            assert end(pid) == 0, "\n".join(Path(f"{root}/said{r}").read_text() for r in range(world))


def gradients_of(method, videos, more):
    """This process's part of a step of `videos` videos against the step in one process, in float64."""
    in_double()
    s = pretrain.arguments(["--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o", "--width", "0.125",
                            "--hidden", "16", "--method", method, *more])
    rank, world, guided = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), (method == "goca",) * 2
    frozen = "flow" if method == "vicc" else None

    def net():
        return model.two_view(vars(s), torch.randn(24, 16, generator=torch.Generator().manual_seed(5)))

    g = torch.Generator().manual_seed(1)
    clips = {view: torch.randn(videos, 2, c, 8, 32, 32, generator=g) for view, c in model.CHANNELS.items()}
    one = net()
    whole = pretrain.step_loss(one, [clips], s, guided, frozen)[0]
    whole.backward()
    dist.init_process_group("gloo")
    several = synchronise_batch_norm(net())
    shared = data_parallel(several, torch.device("cpu"), frozen is not None)
    rows = [videos // world + (r < videos % world) for r in range(world)]
    own = slice(sum(rows[:rank]), sum(rows[:rank + 1]))
    loss = pretrain.step_loss(shared, [{k: v[own] for k, v in clips.items()}], s, guided, frozen, rows)[0]
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert abs(mean.item() / world - whole.item()) < 1e-9 * whole.item(), (mean / world, whole)
    largest = max(p.grad.norm() for p in one.parameters() if p.grad is not None)
    for (name, a), b in zip(one.named_parameters(), several.parameters(), strict=True):
        if a.grad is None:  # of the view that does not learn
            assert b.grad is None or not b.grad.any(), name
            continue
        # a bias before batch norm has gradient 0
        assert (a.grad - b.grad).norm() < 1e-6 * a.grad.norm() + 1e-9 * largest, name
    for (name, a), b in zip(one.named_buffers(), several.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8, msg=name)


def gradients(method, world, videos, more, said):
    for rank, pid in enumerate(start_ranks(world, gradients_of, method, videos, more, said=said)):
        assert end(pid) == 0, Path(f"{said}{rank}").read_text()


def share_of_the_loss(rows, file, out):
    """Save this process's share of the loss of the whole batch, from one all-gather, and its features' gradient."""
    dist.init_process_group("gloo")
    rank, (features, prototypes) = dist.get_rank(), torch.load(file, weights_only=True)  # [2, 4, M, d], [N, d]
    first, m, longest = sum(rows[:rank]), rows[rank], max(rows)
    own = features[:, :, first:first + m].clone().requires_grad_()
    padded = torch.zeros(2, 2, longest, own.shape[-1])
    padded[:, :, :m] = own[:, :2].detach()
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded)
    whole = torch.cat([x[:, :, :r] for x, r in zip(gathered, rows, strict=True)], 2)  # [2, 2, M, d]
    loss = goca.guided_loss(own @ prototypes.T, batch_scores=whole @ prototypes.T, first_row=first, impl="compiled")
    share = loss * m / sum(rows)
    share.backward()
    torch.save({"loss": share.detach(), "gradient": own.grad}, f"{out}{rank}")
    dist.destroy_process_group()


def shares_of_the_loss(rows, file, out, said):
    for rank, pid in enumerate(start_ranks(len(rows), share_of_the_loss, rows, file, out, said=said)):
        assert end(pid) == 0, Path(f"{said}{rank}").read_text()


# --- the commands of the stages --------------------------------------------------------------------------------------
def command(stage, argv, interrupt):
    """What `python STAGE.py ARGV` does; rank 1 gets SIGTERM at its interrupt-th batch of clips, where that is not 0.
    Fine-tuning goes without dropout, which every process draws for itself."""
    classifiers.FINETUNE["vicc"] = classifiers.FINETUNE["vicc"]._replace(dropout=0.0)
    count = iter(range(1, 1000))
    if interrupt and os.environ["RANK"] == "1":
        before_each("clips", data, "augment", lambda when: when == "before clips" and next(count) == interrupt
                    and os.kill(os.getpid(), signal.SIGTERM))
    sys.argv = [f"{stage}.py", *argv]
    command_line({"pretrain": pretrain, "evaluate": evaluate, "search": search}[stage].main)


def command_in_two(stage, argv, interrupt, said, status):
    """A command in two processes, which print to said0 and said1 -> each leaves with its `status`."""
    statuses = [end(pid) for pid in start_ranks(2, command, stage, argv, interrupt, said=said)]
    assert statuses == status, (statuses, [Path(f"{said}{r}").read_text() for r in (0, 1)])


def script(path, argv, folder, environment, largest, status, said):
    """`python path *argv` in a folder, where no file grows beyond `largest` bytes (-1: any does) -> it leaves with
    `status`, having printed to the file `said`."""
    def run():
        os.chdir(folder)
        tempfile.tempdir = None  # read TMPDIR again
        if largest >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        sys.argv = [path, *argv]
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
            sys.exit(1 if isinstance(e.code, str) else e.code)

    assert end(fork(run, said=said, **environment)) == status, Path(said).read_text()


def unread(stage, argv, line, status, said):
    """A command whose output is read to the end of its first line, or, where `line` is empty, not at all -> it prints
    that line, and leaves with `status`. What it complains of goes to the file `said`."""
    def run():
        os.dup2(write, 1), os.close(write)
        command_line(lambda: {"flow": flow, "video_index": video_index}[stage].main(argv))

    read, write = os.pipe()
    with os.fdopen(read) as output:
        if not line:
            output.close()
        pid = fork(run, said=said)
        os.close(write)
        if line:
            got = output.readline()
            assert got == line, (got, Path(said).read_text())
    assert end(pid) == status, Path(said).read_text()


def run_flow(argv):
    """What flow.py does on its command line."""
    command_line(lambda: flow.main(argv))


def flow_on_a_read_only_disk(root, argv, status, said):
    """flow.py where `root` can only be read -> it leaves with `status`."""
    def run():
        make_read_only(root)
        run_flow(argv)

    assert end(fork(run, said=said)) == status, Path(said).read_text()


# --- batch norm on GPUs ----------------------------------------------------------------------------------------------
def gpu_batch_norms(rows, said):
    for rank, pid in enumerate(start_ranks(len(rows), gpu_batch_norm, rows, said=said)):
        assert end(pid) == 0, Path(f"{said}{rank}").read_text()


# --- disturbed processes ---------------------------------------------------------------------------------------------
def disturbed(argv, disturbance, step):
    """Train while rank 1 does something in a step."""
    def hang(*_):
        time.sleep(LIMIT)

    def starve():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    dist.destroy_process_group = hang if disturbance in ("starve", "die") else dist.destroy_process_group  # as NCCL may
    if os.environ["RANK"] == "1":
        in_step(step, {"die": lambda: os._exit(1), "hang": hang, "starve": starve,
                       "warn": lambda: os.kill(os.getpid(), signal.SIGUSR1)}[disturbance])
    train(argv)


def disturb(argv, said, disturbance, step, status):
    """Two processes, one of them disturbed -> each leaves with its `status`."""
    statuses = [end(pid) for pid in start_ranks(2, disturbed, argv, disturbance, step, said=said)]
    assert statuses == status, (statuses, [Path(f"{said}{r}").read_text() for r in (0, 1)])


def agree(late):
    """A signal to one process in call 2, a timer of another in call 3, and a number on the device, are read by all in
    the same call."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    agreement = MaxOverRanks(torch.device("cpu"), 2, late)
    said = [agreement(10 * (rank == 1 and call >= 2), rank == 0 and call == 3, torch.tensor(call + rank))
            for call in range(6)]
    signals, timer, on_device = zip(*said, strict=True)
    assert signals == (*[0] * (2 + late), *[10] * (4 - late)), signals
    assert timer == tuple(int(call == 3 + late) for call in range(6)), timer
    assert on_device == (*[0] * late, *range(1, 7 - late)), on_device
    assert len(agreement.pending) == late


def agreements(said):
    for late in (0, 1):
        for rank, pid in enumerate(start_ranks(2, agree, late, said=said)):
            assert end(pid) == 0, Path(f"{said}{rank}").read_text()


def dies_once(argv):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        in_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
        time.sleep(1)  # until the other has looked where to meet
    pretrain.train(pretrain.arguments(argv))


def restarts(argv, whole):
    """What `torchrun --nproc-per-node 2 --max-restarts 1` does, with forks; rank 1 dies in the third step."""
    for pid in start_ranks(2, train, [*argv, "--out", f"{whole}/whole"]):
        assert end(pid) == 0
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork",
                          rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{free_port()}", rdzv_configs={"rank": 0},
                          run_id="test", monitor_interval=0.1)
    elastic_launch(config, dies_once)([*argv, "--out", f"{whole}/restarted"])
    same(f"{whole}/restarted", f"{whole}/whole")
    headers = [line for line in Path(f"{whole}/restarted/log.jsonl").read_text().splitlines() if "command" in line]
    assert [json.loads(line)["step"] for line in headers] == [0, 2]


# --- what processes have alike ---------------------------------------------------------------------------------------
def train_apart(argv, others):
    """Train; rank 1 with more flags than rank 0."""
    train(argv + (others if os.environ["RANK"] == "1" else []))


def apart(argv, others, said, status):
    """Two processes, the second with `others` on its command line -> each leaves with its `status`."""
    statuses = [end(pid) for pid in start_ranks(2, train_apart, argv, others, said=said)]
    assert statuses == status, (statuses, [Path(f"{said}{r}").read_text() for r in (0, 1)])


def node_local(argv, root, said):
    """A run of two processes goes on although the second finds nothing in its --out; it ends as an undisturbed one."""
    apart([*argv, "--out", f"{root}/whole"], [], said, [0, 0])
    for pid in start_ranks(2, disturbed, [*argv, "--out", f"{root}/run"], "warn", 3):
        assert end(pid) == 128 + signal.SIGUSR1
    assert load_checkpoint(f"{root}/run")["step"] == 3
    apart([*argv, "--out", f"{root}/run"], ["--out", f"{root}/elsewhere"], said, [0, 0])
    same(f"{root}/run", f"{root}/whole")


# --- a full disk -----------------------------------------------------------------------------------------------------
def train_on_full_disk(argv, step):
    in_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))
    train(argv)


def full_disk(argv, out, said):
    """The second save fails; the first is kept, and the same command ends as an uninterrupted run."""
    assert end(fork(train, [*argv, "--out", f"{out}/whole"], said=said)) == 0
    run = [*argv, "--out", f"{out}/run"]
    assert end(fork(train_on_full_disk, run, 3, said=said)) == 2, Path(said).read_text()
    assert load_checkpoint(f"{out}/run")["step"] == 2 and not list(Path(f"{out}/run").glob(".tmp-*"))
    assert end(fork(train, run)) == 0
    same(f"{out}/run", f"{out}/whole")


def serve():
    for line in sys.stdin:
        name, args = json.loads(line)
        said = f"{args.pop('_said')}"
        print(end(fork(lambda: globals()[name](**args), said=said)), flush=True)  # noqa: B023


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGALRM, chain=True)
    serve()

"""Processes by fork, alone and as ranks of one group, and hooks into what they do; for helpers/forked.py."""

import os
import signal
import socket
import sys
import traceback

import pretrain
from support.cli import command_line

LIMIT = 280  # seconds of a process


def train(argv):
    """What pretrain.py does on its command line."""
    command_line(lambda: pretrain.train(pretrain.arguments(argv)))


def fork(function, *args, said=None, **environment):
    """Start function(*args) in a process of its own -> pid; what it prints goes to the file `said`."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    signal.alarm(LIMIT)  # then it prints where it stands, and dies
    try:
        out = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1), os.dup2(out, 2)
        os.environ.update(environment)
        function(*args)
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)


def end(pid):
    """Wait for a process -> its status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world, function, *args, said=None):
    """Start function(*args) in `world` processes of one group -> pids; rank r prints to said + r."""
    port = free_port()
    return [fork(function, *args, said=said and f"{said}{rank}", RANK=str(rank), WORLD_SIZE=str(world),
                 LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(world)]


def before_each(name, owner, attribute, hook):
    """Let hook(name) run before and after every call of owner.attribute."""
    real = getattr(owner, attribute)

    def call(*args, **kwargs):
        hook(f"before {name}")
        out = real(*args, **kwargs)
        hook(f"after {name}")
        return out

    setattr(owner, attribute, call)


def in_step(step, function):
    """Call `function` once, in the loss of the step-th step (from 1) that this process does."""
    count = iter(range(1, 1000))
    before_each("step", pretrain, "step_loss",
                lambda when: when == "before step" and next(count) == step and function())

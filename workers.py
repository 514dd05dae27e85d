"""Work through many files in processes, when any file may crash, stall or fill the memory of what reads it.

Each process has one thread and a pipe of its own: one that dies or stalls costs its own file and no other. Used by
flow.py and videos.py.
"""

import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from multiprocessing.connection import wait

import cv2

from stores import BadInput


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _serve(pipe, function, settings):
    """A process: receives jobs, sends what `in_processes` yields. It ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent then closes the pipe
    cv2.setNumThreads(1)

    def tell(*message):
        if pipe.poll():  # a busy process is sent nothing: the parent is gone
            sys.exit()
        pipe.send(("told", message))

    with suppress(EOFError, ConnectionError):
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            try:
                pipe.send(("done", function(job, settings, tell)))
            except BadInput as e:
                # the cause is an OSError where the output could not be written: then no other job can succeed
                pipe.send(("fatal" if isinstance(e.__cause__, OSError) else "failed", str(e)))
            except Exception as e:  # whatever a library raises on one file must not end the run
                pipe.send(("failed", f"{job[0]} failed: {type(e).__name__} {' '.join(str(e).split())}"))


def in_processes(function, jobs, settings, workers, time_limit):
    """Yield (name, kind, value) as things happen, until all of `jobs` are done.

    function: of a module, function(job, settings, tell) -> result. jobs: {name: job}, job[0] the path of a file.
    time_limit: seconds that a process may say nothing before it is stopped.
    kind "told": value is what the function handed to `tell`. "done": its result. "failed": a sentence, why not.
    Raises BadInput if a function can't write its output, or where processes can't be started.
    """
    context = multiprocessing.get_context("forkserver")  # unlike fork, gives no process the pipes of its siblings
    context.set_forkserver_preload(["torch", "cv2"])
    with suppress(ValueError):  # in another thread than the main one Ctrl-C needs no care
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits: it still imports
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, handler)
    queue, idle, busy = deque(jobs), {}, {}  # {pipe: process}, {pipe: (process, name, time of its last message)}

    def start():
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function, settings), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends with the process
        try:
            pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise BadInput(f"processes can't be started (exit code {process.exitcode}); a script that calls this needs "
                           f'`if __name__ == "__main__":` around the call') from None
        idle[pipe] = process

    def lost(pipe, process, name, why):
        pipe.close()
        process.kill()
        process.join()
        del busy[pipe]
        return name, "failed", f"{jobs[name][0]} {why}"

    try:
        while queue or busy:
            while queue and len(busy) < workers:
                if not idle:
                    start()
                pipe, process = idle.popitem()
                busy[pipe] = process, queue.popleft(), time.monotonic()
                with suppress(ConnectionError):  # already dead: its pipe says so below
                    pipe.send(jobs[busy[pipe][1]])
            ready = wait(busy, timeout=1)
            for pipe in ready:
                process, name, _ = busy[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    yield lost(pipe, process, name, f"ended the process that read it (exit code {process.exitcode}); "
                                                    f"convert it, or see whether memory ran out")
                    continue
                if kind == "fatal":
                    raise BadInput(value)
                busy[pipe] = process, name, time.monotonic()
                if kind != "told":
                    idle[pipe] = process
                    del busy[pipe]
                yield name, kind, value
            for pipe, (process, name, last) in list(busy.items()):
                if time.monotonic() - last > time_limit and not pipe.poll():
                    yield lost(pipe, process, name, f"gave nothing for {time_limit:g} s and was stopped; convert it, "
                                                    f"or see whether its disk is well")
    finally:
        for pipe in [*idle, *busy]:
            pipe.close()
        for process in [*idle.values(), *(process for process, _, _ in busy.values())]:
            process.join(timeout=10)  # a busy one stops after the piece of work at hand
            process.kill()

"""Work through many files in processes, when any file may crash, stall or fill the memory of what reads it.

Each process has one thread, a pipe of its own and a thread here that receives from it: one that dies, stalls or stops
in the middle of a message costs its own file and no other. Used by flow.py and video_index.py.
"""

import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress

import cv2

from support.errors import BadInput

MAX_CONSECUTIVE_FAILURES = 20  # files: so many, one after the other, are no fault of theirs
START_TIMEOUT = 600  # seconds for a process to start: the first waits until torch is imported
EXIT_TIMEOUT = 10  # seconds for a process to end, once asked and once killed


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def one_line(e):
    """The type and message of an exception, in one line."""
    return f"{type(e).__name__} {' '.join(str(e).split())}"


def _unavailable(path):
    """Whether a file or folder, or its disk, is gone: nothing that its content could bring about."""
    try:
        if os.path.isdir(path):  # of images
            os.listdir(path)
            return False
        with open(path, "rb") as f:
            f.read(1)
            f.seek(os.fstat(f.fileno()).st_size // 2)
            f.read(1)
    except PermissionError:
        return False
    except OSError:
        return True
    return False


def _serve(pipe, function, settings):
    """A process: receives jobs, sends what `run_in_processes` yields. It ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent then closes the pipe
    cv2.setNumThreads(1)

    def report(*message):
        if pipe.poll():  # a busy process is sent nothing: the parent is gone
            sys.exit()
        pipe.send(("progress", message))

    with suppress(EOFError, ConnectionError):
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            try:
                pipe.send(("done", function(job, settings, report)))
            except BadInput as e:
                # the cause is an OSError where the output could not be written: then no other job can succeed
                fatal = isinstance(e.__cause__, OSError)
                pipe.send(("fatal" if fatal else "unavailable" if _unavailable(job[0]) else "failed", str(e)))
            except Exception as e:  # whatever a library raises on one file must not end the run
                pipe.send(("unavailable" if _unavailable(job[0]) else "failed", f"{job[0]} failed: {one_line(e)}"))


class _Worker:
    """A process that serves, and the thread that receives from it. Raises BadInput where it can't be started."""

    def __init__(self, context, function, settings, events):
        self.name, self.lost = None, False  # the job that it has; whether it was given up
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, settings), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        try:
            if not self.pipe.poll(START_TIMEOUT):
                raise EOFError
            self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(EXIT_TIMEOUT)
            raise BadInput(f"processes can't be started (exit code {self.process.exitcode}); a script that calls this "
                           f'needs `if __name__ == "__main__":` around the call') from None
        self.since = None  # since when it has sent nothing; None while its message waits here, or it has no job
        self.taken = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._receive, args=(events,), daemon=True)
        self.thread.start()

    def _receive(self, events):
        with suppress(EOFError, OSError):
            while True:
                message = self.pipe.recv()
                self.since = None
                events.put((self, *message))
                self.taken.acquire()  # no more before this one is taken: decoders wait until their frames are used
        self.since = None
        events.put((self, "ended", None))

    def begin(self, name, job):
        self.name, self.since = name, time.monotonic()
        with suppress(ConnectionError):  # already dead: its pipe says so
            self.pipe.send(job)

    def take(self, kind):
        """Its message of this kind was handled: it may send the next."""
        self.since = time.monotonic() if kind == "progress" else None
        self.taken.release()

    def hang_up(self):
        """Close its pipe at both ends at once, even in the middle of a message."""
        self.lost = True
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as s:
            s.shutdown(socket.SHUT_RDWR)
        self.taken.release()

    def end(self, grace):
        """Wait so many seconds for the process to end, then kill it."""
        self.process.join(grace)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(EXIT_TIMEOUT)
        if self.process.exitcode is None:  # it waits for a disk that is dead; Python would wait for it when it ends
            multiprocessing.process._children.discard(self.process)
        self.thread.join(EXIT_TIMEOUT)
        self.pipe.close()


def _start_server(context):
    """The process from which the others are forked. Raises BadInput where it can't be started."""
    context.set_forkserver_preload(["torch", "cv2", "av"])  # what takes longest to import, once for all
    handler = None
    with suppress(ValueError):  # in another thread than the main one Ctrl-C needs no care
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the server inherits: it still imports
    try:
        forkserver.ensure_running()
    except OSError as e:  # "AF_UNIX path too long", a full disk
        raise BadInput(f"processes can't be started: no socket for them in {tempfile.gettempdir()} ({e}); set TMPDIR "
                       f"to a folder with a short name, such as /tmp") from e
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


class _Failures:
    """Counts files, one after the other, that gave nothing by no fault of theirs. Raises BadInput at too many."""

    def __init__(self):
        self.count = 0

    def add(self, not_its_fault, why):
        self.count = self.count + 1 if not_its_fault else 0
        if self.count == MAX_CONSECUTIVE_FAILURES:
            raise BadInput(f"{self.count} videos in a row gave nothing, the last one: {why}. See whether their disk is "
                           f"there and whether memory suffices (fewer --workers take less); the same command continues")


def _end_all(workers):
    for worker in workers:
        worker.hang_up()
    until = time.monotonic() + EXIT_TIMEOUT  # a busy one stops after the piece of work at hand
    for worker in workers:
        worker.end(max(0, until - time.monotonic()))


def run_in_processes(function, jobs, settings, workers, time_limit):
    """Yield (name, kind, value) as things happen, until all of `jobs` are done.

    function: of a module, function(job, settings, report) -> result. jobs: {name: job}, job[0] the path of a file.
    time_limit: seconds that a process may send nothing before it is stopped.
    kind "progress": value is what the function handed to `report`. "done": its result. "failed": why not, a message.
    "unavailable": a message, too, where the file itself can't be read now.
    Raises BadInput if a function can't write its output, where processes can't be started, or when
    MAX_CONSECUTIVE_FAILURES files, one after the other, can't be read, stall, or have their process killed.
    """
    context = multiprocessing.get_context("forkserver")  # unlike fork, gives no process the pipes of its siblings
    _start_server(context)
    events, left, idle, busy, failures = queue.SimpleQueue(), deque(jobs), [], set(), _Failures()

    def lose(worker, why, not_its_fault):
        busy.discard(worker)
        worker.hang_up()
        worker.end(0)
        failures.add(not_its_fault, why := f"{jobs[worker.name][0]} {why}")
        return worker.name, "failed", why

    try:
        while left or busy:
            while left and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(context, function, settings, events)
                busy.add(worker)
                worker.begin(left[0], jobs[left.popleft()])
            try:
                worker, kind, value = events.get(timeout=1)
            except queue.Empty:
                worker = None
            if worker is None or worker.lost:
                pass
            elif worker in idle:  # it ended between two jobs
                idle.remove(worker)
                worker.hang_up()
                worker.end(0)
            elif kind == "ended":
                worker.process.join(EXIT_TIMEOUT)
                code = worker.process.exitcode
                yield lose(worker, f"ended the process that read it (exit code {code}); convert it, or see whether "
                                   f"memory ran out", code == -signal.SIGKILL)
            elif kind == "fatal":
                raise BadInput(value)
            else:
                worker.take(kind)
                if kind != "progress":
                    busy.discard(worker)
                    idle.append(worker)
                    failures.add(kind == "unavailable", value)
                yield worker.name, kind, value
            now = time.monotonic()
            for worker in [w for w in busy if (since := w.since) is not None and now - since > time_limit]:
                yield lose(worker, f"gave nothing for {time_limit:g} s and was stopped; convert it, or see whether its "
                                   f"disk is well", True)
    finally:
        _end_all([*idle, *busy])

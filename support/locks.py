"""Locks on files, so that two processes don't write in one place."""

import errno
import fcntl
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support.distributed import run_on_all_ranks
from support.errors import BadInput
from support.files import writing


def try_lock(file, warning):
    """Lock an open file until it is closed -> whether it is locked; False where another process holds it, and None,
    with a warning, where the file system can't lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not held on by forked loader processes
        return True
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print(f"warning: {file.name} can't be locked ({e.strerror}); {warning}", file=sys.stderr)
        return None


@contextmanager
def only_one(out, command):
    """No other process makes the file `out` meanwhile; `command`: what makes such files. Raises BadInput where one
    does; where the file system can't lock, a message says so."""
    path = Path(out).with_name(f".{Path(out).name}.lock")
    with writing(path):
        file = open(path, "a")
    with file:
        if try_lock(file, f"see to it that no two runs make {out}") is False:
            raise BadInput(f"another {command} is making {out}: wait for its end, or give another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def only_these_processes(out, command, rank):
    """`only_one` for the processes of one command: the first holds the lock, and what it raises all raise."""
    with ExitStack() as meanwhile:
        run_on_all_ranks(lambda: None if rank else meanwhile.enter_context(only_one(out, command)))
        yield

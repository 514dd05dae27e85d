"""A file that another process is making."""

import multiprocessing
from contextlib import contextmanager

from support.locks import only_one


@contextmanager
def made_elsewhere(out, command):
    fork = multiprocessing.get_context("fork")
    locked, ended = fork.Event(), fork.Event()

    def hold():
        with only_one(out, command):
            locked.set()
            ended.wait(60)

    other = fork.Process(target=hold, daemon=True)
    other.start()
    assert locked.wait(60)
    try:
        yield
    finally:
        ended.set()
        other.join()

"""What the user can mend: the two errors that end a command with a message in place of a traceback.

A video that can't be used ends none: it is skipped, which means that it is counted and named. Why is its fault, a
message that begins with its name; all stages print it as `skipped: <fault>`.
"""

import os

EXIT_LOST = os.EX_TEMPFAIL  # 75: status of a process that waited in vain for the others; the same command continues


class BadInput(ValueError):
    """Something the user can mend. Stages print it as one message and leave with status 2."""

    status = 2
    printed = None  # True: another process prints it; False: this one, for all; None: each has it for itself


class TemporaryFailure(BadInput):
    """The file or the processes may be well, and another start may succeed: status 75, as sysexits.h has it."""

    status = os.EX_TEMPFAIL

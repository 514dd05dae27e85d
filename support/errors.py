"""What the user can mend: the two errors that end a command with a message in place of a traceback."""

import os

EXIT_LOST = os.EX_TEMPFAIL  # 75: status of a process that waited in vain for the others; the same command continues


class BadInput(ValueError):
    """Something the user can mend. Stages print it as one message and leave with status 2."""

    status = 2
    printed = None  # True: another process prints it; False: this one, for all; None: each has it for itself


class Unreadable(BadInput):
    """A file that may be well, and which another start may be able to read: status 75."""

    status = os.EX_TEMPFAIL

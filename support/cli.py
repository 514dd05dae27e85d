"""What all commands share: messages and exit statuses, the layout of their help, printing.

`command_line` turns what a stage raises into one message and its exit status (docs/training.md lists them).
"""

import argparse
import math
import os
import sys
import time

from support.errors import BadInput


def command_line(main):
    """Run a stage's `main` and leave with its status; BadInput is one message and its status, Ctrl-C is 130, an output
    that nobody reads any more, as of `| head`, 141."""
    try:
        status = main()
        print(end="", flush=True)
        sys.exit(status)
    except BrokenPipeError:
        _mute()
        sys.exit(141)
    except BadInput as e:
        if e.printed is None:
            _after_the_first()
        if e.printed:
            time.sleep(2)  # torchrun ends all processes once one is gone, that which prints the message too
        else:
            print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(e.status)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


def _after_the_first():
    """Wait in all processes of a machine but the first: what all have to say it says, and torchrun ends the others."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are BadInput, which one process says of all."""

    def error(self, message):
        raise BadInput(message.removeprefix("argument "))


def _number(kind, good, must):
    """A type of argparse: a number of `kind` that is `good`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"{text} must be {must}")
        return value
    return parse


positive = _number(float, lambda x: 0 < x < math.inf, "a number above 0, and finite")
non_negative = _number(float, lambda x: 0 <= x < math.inf, "a number of at least 0, and finite")
fraction = _number(float, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
positive_int = _number(int, lambda x: x > 0, "a whole number above 0")
non_negative_int = _number(int, lambda x: x >= 0, "a whole number of at least 0")
random_seed = _number(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2^32 - 1")  # as numpy and sklearn take


class Help(argparse.HelpFormatter):
    """Help of a command: each flag with its default where it has one and its text names none."""

    def add_argument(self, action):
        value = action.default
        if action.help is argparse.SUPPRESS:
            return
        has = not (value is None or value is False or value in ("", [], argparse.SUPPRESS))
        if has and "default" not in (action.help or ""):
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            default = f"default: {shown.replace('%', '%%')}"
            action.help = f"{action.help} ({default})" if action.help else default
        super().add_argument(action)


class Subcommand(argparse.ArgumentParser):
    """The parser of a command in parts, and of each: what a part doesn't know is an error with its own usage, not the
    whole command's."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": Help, **settings})

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message):
        _after_the_first()
        super().error(message)


def _mute():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes there too


def say(*lines, end="\n"):
    """Print lines at once, names that are no Unicode too; where nobody reads them any more, as after `| head -1`, the
    work goes on without."""
    try:
        print(*(line.encode(errors="backslashreplace").decode() for line in lines), sep="\n", end=end, flush=True)
    except BrokenPipeError:
        _mute()

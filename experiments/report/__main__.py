"""The page of a run: what was trained, its curves, what it is worth, and its films, playing.

    python -m experiments.report RUN --out PAGE                                  # while it trains, from its log alone
    python -m experiments.report RUN --json untrained.json sep.json goca.json --out PAGE

In   RUN/log.jsonl, or a log by itself; results of evaluate.py: of the untrained network (--checkpoint none), of other
     runs to compare, and of this one, which is known by its method and settings; films, flow and prototypes, where the
     log and the results say they are. What is lacking is named.
Out  PAGE/index.html, which opens by double click, with the films' previews beside it.

While the run goes on the page reloads itself, and --watch 30 makes it anew every 30 s until the run ends.
"""

import argparse

from support.cli import Help, command_line, positive


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.report", formatter_class=Help,
                                description="The page of a run, which plays its films and opens without a server.")
    p.add_argument("run", metavar="RUN", help="a run's folder, or its log.jsonl by itself")
    p.add_argument("--json", nargs="+", default=[], metavar="FILE",
                   help="results of evaluate.py: untrained, of other runs, of this run")
    p.add_argument("--out", required=True, help="folder of the page: OUT/index.html")
    p.add_argument("--split", type=int, help="of a result on several (default: the first)")
    p.add_argument("--watch", type=positive, metavar="SECONDS", help="make it anew so often until the run ends")
    s = p.parse_args(argv)
    from experiments.report.page import report  # here: processes that make previews import this file, and need no more
    return report(s)


if __name__ == "__main__":
    command_line(main)

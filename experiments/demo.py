"""The end of `make demo`: the table, what it means, and where the page of the run is.

    python -m experiments.demo DEMO

In   DEMO/untrained.json, DEMO/goca.json (evaluate.py retrieval) and the committed run without guiding,
     results/guiding_28/sep/seed45.json.
Out  R@1 and R@5 of the three by view, two sentences, the page that experiments/report wrote.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from experiments.tables import load, show_files
from support.cli import Help, command_line

SEP = Path(__file__).parents[1] / "results" / "guiding_28" / "sep" / "seed45.json"


def meaning(untrained, guided):
    """Two sentences on the R@1 of two results of the same queries, {view: {"R@1", "R@1 chance", ...}}."""
    before, after = untrained["rgb"], guided["rgb"]
    chance, error = after["R@1 chance"], after["R@1 standard error"]
    shares = (f"RGB's nearest video shows the same action for {after['R@1']:.0f} of 100 queries, where the untrained "
              f"network finds {before['R@1']:.0f} and chance {chance:.0f}")
    if after["R@1"] - max(before["R@1"], chance) > 3 * error:
        return (f"{shares}: guided by flow it learned what moves, from films whose clothes and backgrounds say nothing "
                f"of the action. Without guiding (sep) it groups clothes and backgrounds and stays at chance.")
    return (f"{shares}: in this run RGB did not learn, which happens with some seeds. docs/results.md counts them; "
            f"SEED=1 DEMO=demo1 runs another.")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.demo", formatter_class=Help,
                                description="The table of a demo, what it means, where its page is.")
    p.add_argument("folder", help="what `make demo` filled")
    folder = Path(p.parse_args(argv).folder)
    files = [str(folder / "untrained.json"), str(SEP), str(folder / "goca.json")]
    show_files(SimpleNamespace(files=files, k=[1, 5]))
    print(f"\n{meaning(load(files[0])['results'], load(files[2])['results'])}\n")
    print(f"a page of it all, which plays; open it in a browser: {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    command_line(main)

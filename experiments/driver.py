"""Commands that make results, each run once and noted in RESULTS/commands.jsonl with its seconds and status."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from support.errors import BadInput
from support.files import check_folder

ROOT = Path(__file__).parents[1]


def from_root(word):
    """A word of a command without the checkout's own path: commands run there, and others read what is noted."""
    return word.removeprefix(f"{ROOT}{os.sep}")


def without_folders(command, folders):
    """A command without where its run and its results lie, which may have been moved: only the rest decides what it
    finds."""
    places = {"--checkpoint", "--features", "--out"}
    words = [word for before, word in zip(["", *command], command, strict=False) if not {before, word} & places]
    for folder in folders:
        words = [word.removeprefix(f"{folder}{os.sep}") for word in words]
    return words


class Driver:
    """Runs commands once: each is noted in `results`/commands.jsonl with its seconds, however it ended.

    A file is known by its path below `results`, or below `work`, where checkpoints may lie, wherever these are now.
    """

    def __init__(self, results, work=None):
        self.folders = [results, work or results]
        self.path, self.failed = results / "commands.jsonl", []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done = [(line["out"], [*map(from_root, line["command"])]) for line in read_commands(results)
                     if line["status"] == 0]

    def made_by(self, out):
        """The last command that made a file -> (command, folder below which the file lay, that of now), or None."""
        folder = max((f for f in self.folders if out.is_relative_to(f)), key=lambda f: len(f.parts))
        below = out.relative_to(folder).parts
        for noted, command in reversed(self.done):
            parts = Path(noted).parts
            if parts[-len(below):] == below:
                return command, from_root(str(Path(*parts[:-len(below)]))), from_root(str(folder))
        return None

    def check(self, command, out):
        """Raise BadInput where `out` was made by another command than this."""
        if not (found := self.made_by(out)):
            return
        made, *folders = found
        if without_folders(made, folders) != without_folders([*map(from_root, command)], folders):
            raise BadInput(f"{out} was made by another command ({shlex.join(made)}): give another folder for the "
                           f"results, or remove what it made")

    def __call__(self, command, out, log, processes=1):
        """Run `python *command`, whose result is the file `out`, unless that was done -> whether `out` is there."""
        noted, command = from_root(str(out)), [*map(from_root, command)]
        if out.exists() and self.made_by(out):
            self.check(command, out)
            return True
        check_folder(log.parent, "the folder of the log,")
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        print(f"{shlex.join(command)}\n    log: {log}", flush=True)
        began = time.perf_counter()
        with open(log, "a") as f, subprocess.Popen([*launch, *command], cwd=ROOT, stdout=f, stderr=f) as process:
            try:
                process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()  # pre-training and fine-tuning save and leave
                    process.wait()
                seconds = time.perf_counter() - began
                with open(self.path, "a") as notes:
                    notes.write(json.dumps({"out": noted, "command": command, "seconds": round(seconds, 1),
                                            "status": process.returncode}) + "\n")
        if process.returncode:
            self.failed.append(log)
            print(f"    failed with status {process.returncode}: {(log.read_text().splitlines() or ['-'])[-1]}")
            return False
        self.done.append((noted, command))
        print(f"    {seconds:.0f} s", flush=True)
        return True


def read_commands(results):
    """`results`/commands.jsonl -> list of {"out", "command", "seconds", "status"}."""
    path, lines = Path(results) / "commands.jsonl", []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            line = json.loads(text)
            Path(line["out"]), shlex.join(line["command"]), line["seconds"] + line["status"]
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path} is damaged at line {number} ({e!r}); remove that line") from e
        lines.append(line)
    return lines

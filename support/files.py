"""Files that one stage hands the next: written whole or not at all, checked when loaded, never executed.

`atomic` writes to a temporary name and renames. `save_arrays` and `load_arrays` are the .npz files with a JSON header
that hold prototypes, features and the index of videos.
"""

import json
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from support.errors import BadInput


@contextmanager
def atomic(path, exclusive=False):
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well and vanishes otherwise.

    exclusive: raise FileExistsError where `path` stands already, in place of replacing it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise BadInput(f"{path} can't be written ({e.strerror}); choose a folder that can") from e
    os.close(fd)
    try:
        yield Path(name)
        with open(name, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        with suppress(PermissionError):  # a file system without rights of its own
            os.chmod(name, 0o666 & ~umask)
        (_link if exclusive else os.replace)(name, path)
    except FileExistsError:
        raise
    except OSError as e:
        raise BadInput(f"{path} could not be written ({e.strerror}); what stood there before is untouched") from e
    finally:
        Path(name).unlink(missing_ok=True)


def _link(source, path):
    """os.link; where there are no hard links, `path` is claimed by an empty file that the other then replaces."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(source, path)


def check_writable(path, option):
    """Before long work: raise BadInput if it could not write its result, the file `path` of `option`, in the end."""
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that no file can have
        raise BadInput(f"{option} {path} is a folder; give the name of a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        with suppress(FileNotFoundError):
            os.lstat(path)  # its name may be one that no file can have
    except OSError as e:
        raise BadInput(f"{option} {path} can't be written ({e.strerror}); choose a folder that can") from e


def check_folder(path, option):
    """Before long work: raise BadInput if its results could not be written into the folder `path` of `option`."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise BadInput(f"{option} {path} is a file; give a folder")
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise BadInput(f"{option} {path} can't be written ({e.strerror}); choose a folder that can") from e


def save_arrays(path, kind, header, **arrays):
    """Write arrays and a JSON header to one .npz file.

    path: the file, any suffix. kind: what it holds ("prototypes", "features"). header: JSON-able settings.
    """
    header = {"kind": kind, "version": 1, **header}
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, header=np.array(json.dumps(header)), **arrays)


def load_arrays(path, kind, made_by):
    """Read what `save_arrays` wrote -> (header, {name: array}); nothing in the file is executed.

    Raises BadInput, with the command that makes the file, where it is missing, damaged or of another kind.
    """
    if not os.path.isfile(path):
        raise BadInput(f"{path} doesn't exist; make it with: {made_by}")
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {k: f[k] for k in f.files}
        header = json.loads(str(arrays.pop("header")))
    except Exception as e:  # numpy, zipfile and json each have their own words for a damaged file
        why = "it holds no plain arrays" if "allow_pickle" in str(e) else e  # no advice to execute what is in the file
        raise BadInput(f"{path} is damaged or no {kind} file ({why}); make it with: {made_by}") from e
    if header.get("kind") != kind or header.get("version") != 1:
        raise BadInput(f"{path} holds {header.get('kind')} version {header.get('version')}, but {kind} version 1 is "
                       f"needed; make it with: {made_by}")
    return header, arrays


def temporary_folder():
    """A folder that vanishes. Raises BadInput where there can be none."""
    try:
        return tempfile.TemporaryDirectory()
    except OSError as e:
        raise BadInput(f"no temporary folder can be made ({e.strerror}); set TMPDIR to a folder that can be "
                       f"written") from e


@contextmanager
def writing(path):
    """Within: an OSError becomes a BadInput that names `path`. For what is no whole file, which `atomic` writes."""
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path} can't be written ({e.strerror}): make room, and the same command continues") from e

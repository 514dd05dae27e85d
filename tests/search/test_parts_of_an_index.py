"""search.py index beside other work: interrupted, of neighbours."""

import os
import shutil

import pytest
from helpers.indexing import index

from support.collection_index import load_collection
from support.errors import BadInput

PART = "0123456789abcdef" * 2


def test_interrupted_work_of_other_settings_is_refused(films, rgb_index, tmp_path):
    parts = [shutil.copy(rgb_index, tmp_path / f".i.npz.{PART[k:]}{PART[:k]}.npz") for k in range(2)]
    with pytest.raises(BadInput, match=r"^.*\.i\.npz\.0123.* \(protocol: fast there, goca now\); it is interrupted "
                                       r"work: give those, or another --out, or delete it and the 1 more beside it$"):
        index(films, tmp_path / "i.npz", "--protocol", "goca")
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(part) for part in parts)


def test_parts_are_those_of_this_index_alone(films, rgb_index, tmp_path):
    """Whatever its name: brackets are no pattern, and a longer name is another index's."""
    other = shutil.copy(rgb_index, tmp_path / f".films[1].npz.v2.{PART}.npz")
    assert index(films, tmp_path / "films[1].npz") == 0
    assert len(load_collection(tmp_path / "films[1].npz").files) == 5
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(other), "films[1].npz"]

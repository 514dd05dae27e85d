"""Lists as their authors, other projects, editors and users write them; folders in place of lists."""

import json
from types import SimpleNamespace

import pytest
from helpers.clips import film, numbered

import evaluate
from support.datasets import read_split
from support.errors import BadInput

BOM = "\ufeff"


@pytest.fixture
def films(tmp_path):
    """make("a/b", ...) writes films of these names -> the folder of videos."""
    def make(*names, suffix=".avi"):
        for name in names:
            film(tmp_path / "videos" / f"{name}{suffix}", numbered(3))
        return tmp_path / "videos"
    return make


def lists(tmp_path, **files):
    (tmp_path / "lists").mkdir(exist_ok=True)
    for name, text in files.items():
        (tmp_path / "lists" / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return tmp_path / "lists"


def labels(found):
    """{name: class or None} in the list's order."""
    return {v.name: found.classes[v.label] if v.label >= 0 else None for v in found.videos}


# --- Kinetics --------------------------------------------------------------------------------------------------------
def test_kinetics_csv_with_floats_quotes_and_commas(tmp_path, films):
    videos = films("a/id-1_______000010_000020", "a/id-2_______000001_000011", "a/id-3_______000005_000015")
    splits = lists(tmp_path, train__csv=f'{BOM}"label","youtube_id","time_start","time_end","split"\r\n'
                   '"petting animal (not cat, dog)","id-1______",10.0,20.0,"train"\r\n'
                   'air drumming,id-2______, 1 ,11,train\r\n"say ""hi""",id-3______,5,15.0,train\r\n')
    found = read_split("k400", videos, splits)
    assert labels(found) == {"a/id-1_______000010_000020": "petting_animal_(not_cat,_dog)",
                             "a/id-2_______000001_000011": "air_drumming", "a/id-3_______000005_000015": 'say_"hi"'}
    # columns in another order, and more of them, as Kinetics-700 has
    splits = lists(tmp_path, train__csv="youtube_id,label,is_cc,time_end,time_start\nid-1______,run,0,20.0,10\n")
    assert labels(read_split("k400", videos, splits)) == {"a/id-1_______000010_000020": "run"}
    splits = lists(tmp_path, train__csv="label,youtube_id,time_start,time_end\nrun,id-1______,soon,20\n")
    with pytest.raises(BadInput, match=r"not in k400's published format \(ValueError.*soon"):
        read_split("k400", videos, splits)
    splits = lists(tmp_path, train__csv="label,youtube_id,time_start,time_end\nrun,id-1______,inf,20\n")
    with pytest.raises(BadInput, match=r"not in k400's published format \(OverflowError"):
        read_split("k400", videos, splits)


def test_kinetics_files_named_by_id_alone(tmp_path, films):
    videos = films("val/run/abcdefghijk", "val/sit/bcdefghijkl", suffix=".mkv")
    splits = lists(tmp_path, val__csv="label,youtube_id,time_start,time_end,split\nrun,abcdefghijk,10,20,val\n"
                   "sit,bcdefghijkl,0,10,val\nsit,cdefghijklm,0,10,val\nrun,abcdefghijk,30,40,val\n")
    found = read_split("k400", videos, splits, subset="test")
    assert labels(found) == {"val/run/abcdefghijk": "run", "val/sit/bcdefghijkl": "sit"}
    assert found.absent == ["cdefghijklm_000000_000010"]
    assert any("1 entries of the test list name a video once more" in note for note in found.notes)


@pytest.mark.parametrize(("file", "rows"), [
    ("kinetics400_val_list_videos.txt", ["run_fast/aaaaaaaaaaa_000001_000011.mp4 1", "sit/bbbbbbbbbbb.mp4 0"]),
    ("kinetics400_val_list_rawframes.txt", ["run_fast/aaaaaaaaaaa_000001_000011 300 1", "sit/bbbbbbbbbbb 250 0"]),
    ("val.csv", ["/data/k400/run_fast/aaaaaaaaaaa_000001_000011.mp4 1", "/data/k400/sit/bbbbbbbbbbb.mp4 0"]),
    ("val.csv", ["path,label", "run_fast/aaaaaaaaaaa_000001_000011.mp4,run fast", "sit/bbbbbbbbbbb.mp4,sit"]),
    ("val.csv", ["run fast/aaaaaaaaaaa_000001_000011.mp4,1", "sit/bbbbbbbbbbb.mp4,0"]),
    ("val_videofolder.txt", ["run fast/aaaaaaaaaaa_000001_000011 300 1", "sit/bbbbbbbbbbb 250 0"])])
def test_kinetics_lists_of_other_projects(tmp_path, films, file, rows):
    videos = films("k/run_fast/aaaaaaaaaaa", "k/sit/bbbbbbbbbbb_000003_000013", suffix=".mkv")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / file).write_text("\n".join(rows) + "\n")
    found = read_split("k400", videos, tmp_path / "lists", subset="test")
    assert labels(found) == {"k/run_fast/aaaaaaaaaaa": "run_fast", "k/sit/bbbbbbbbbbb_000003_000013": "sit"}


def test_kinetics_numbers_are_named_by_the_label_map(tmp_path, films):
    videos = films("aaaaaaaaaaa", "bbbbbbbbbbb", suffix=".mkv")
    splits = lists(tmp_path, kinetics400_train_list_videos__txt="aaaaaaaaaaa.mp4 2\nbbbbbbbbbbb.mp4 0\n")
    assert labels(read_split("k400", videos, splits)) == {"aaaaaaaaaaa": "2", "bbbbbbbbbbb": "0"}
    lists(tmp_path, label_map_k400__txt="sit\nstand\nrun fast\n")
    assert labels(read_split("k400", videos, splits)) == {"aaaaaaaaaaa": "run_fast", "bbbbbbbbbbb": "sit"}


# --- the mark that some editors put before UTF-8 ---------------------------------------------------------------------
def test_a_mark_at_the_start_of_a_text_changes_nothing(tmp_path, films):
    videos = films("Walk/v_a", "Run/v_b", "id1")
    (tmp_path / "hmdb").mkdir()
    plain = {
        "ucf101": {"classInd__txt": "1 Walk\n2 Run\n", "trainlist01__txt": "Walk/v_a.avi 1\nRun/v_b.avi 2\n"},
        "hmdb51": {"Walk_test_split1__txt": "v_a.avi 1\n", "Run_test_split1__txt": "v_b.avi 1\n"},
        "diving48": {"Diving48_V2_train__json": '[{"vid_name": "id1", "label": 0}]',
                     "Diving48_vocab__json": '[["Back", "15som"]]'},
        "ssv2": {"train__json": '[{"id": "id1", "template": "Moving [something] up"}]',
                 "labels__json": '{"Moving something up": "0"}'},
        "k400": {"train__csv": "label,youtube_id,time_start,time_end,split\nrun,id1,0,10,train\n"},
        "list": {"train__txt": "Walk/v_a.avi 0\nRun/v_b.avi 1\n"}}
    for dataset, files in plain.items():
        expected = labels(read_split(dataset, videos, lists(tmp_path, **files)))
        marked = lists(tmp_path, **{name: BOM + text for name, text in files.items()})
        found = read_split(dataset, videos, marked)
        assert labels(found) == expected and not found.absent and len(expected) in (1, 2), dataset
        assert None not in expected.values()
        for file in marked.iterdir():
            file.unlink()


# --- other data sets -------------------------------------------------------------------------------------------------
def test_something_something_v2(tmp_path, films):
    videos = films("20bn/78687", "20bn/100", suffix=".mkv")
    splits = lists(tmp_path, **{
        "something-something-v2-labels__json": json.dumps(
            {"Pushing something": "0", "Holding something next to something": "10", "Moving something up": "9"}),
        "something-something-v2-train__json": json.dumps(
            [{"id": "78687", "label": "holding potato next to bottle", "placeholders": ["potato", "bottle"],
              "template": "Holding [something] next to [something]"},
             {"id": 100, "label": "moving pen up", "template": "Moving [something] up"}]),
        "something-something-v2-validation__json": json.dumps([{"id": "7", "template": "Pushing [something]"}])})
    found = read_split("ssv2", videos, splits)
    assert found.classes == ["Pushing something", "Moving something up", "Holding something next to something"]
    assert labels(found) == {"20bn/78687": "Holding something next to something", "20bn/100": "Moving something up"}
    with pytest.raises(BadInput, match="none of the 1 videos of ssv2's test list"):
        read_split("ssv2", videos, splits, subset="test")


def test_diving48_version_1(tmp_path, films):
    videos = films("rgb/x_1", suffix=".mkv")
    row = json.dumps([{"vid_name": "x_1", "label": 1, "start_frame": 0, "end_frame": 9}])
    splits = lists(tmp_path, Diving48_train__json=row, Diving48_vocab__json='[["Back", "Dive"], ["Front", "Tuck"]]')
    found = read_split("diving48", videos, splits)
    assert labels(found) == {"rgb/x_1": "Front-Tuck"} and "Diving48_train.json" in found.notes[0]


def test_a_class_that_classind_lacks_is_not_called_absent(tmp_path, films):
    videos = films("Walk/v_a", "Jump High/v_b")
    splits = lists(tmp_path, classInd__txt="1 Walk\n", trainlist01__txt="Walk/v_a.avi 1\nJump High/v_b.avi 2\n"
                   "Walk/v_gone.avi 1\n")
    found = read_split("ucf101", videos, splits)
    assert labels(found) == {"Walk/v_a": "Walk", "Jump High/v_b": None} and found.absent == ["Walk/v_gone"]
    assert any("classInd.txt lacks 1 classes of listed videos that are there (Jump High)" in n for n in found.notes)
    settings = SimpleNamespace(dataset="ucf101", videos=videos, splits=splits, command="retrieval")
    env = SimpleNamespace(s=settings, rank=0, films=None, store=None, rgb=None)
    assert evaluate.labelled_videos(env, 1, "train").skipped() == [
        "Walk/v_gone: listed, but absent", "Jump High/v_b: there, but of no class"]


# --- lists of one's own ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [
    "a/one.mp4 10\nb/two.x.mp4 9\n\nthree 10\n", "a/one.mp4,10\nb/two.x.mp4, 9\nthree,10\n",
    "a/one\t10\nb/two.x\t9\nthree\t10",
    "path,label\r\na/one,10\r\nb/two.x,9\r\nthree,10\r\n", '"a/one.avi" "10"\n./b/two.x.avi 9\nthree.avi 10',
    "a/one;10\nb/two.x;9\nthree;10\n"])
@pytest.mark.parametrize("file", ["train.txt", "train.csv"])
def test_lists_of_ones_own(tmp_path, films, text, file):
    videos = films("a/one", "b/two.x", "three", "unlisted")
    (tmp_path / "train").mkdir()  # one folder below is fine too
    (tmp_path / "train" / file).write_text(text)
    found = read_split("list", videos, tmp_path)
    assert labels(found) == {"a/one": "10", "b/two.x": "9", "three": "10"} and found.classes == ["9", "10"]


def test_names_as_labels_and_quoted_paths(tmp_path, films):
    videos = films("a b", "c,d", "e", suffix=".avi")
    for text in ('a b.avi,brush hair\n"c,d.avi","wave, twice"\ne.avi,brush hair\n',
                 '"a b.avi" "brush hair"\n"c,d.avi" "wave, twice"\ne.avi "brush hair"\n',
                 "a b.avi\tbrush hair\nc,d.avi\twave, twice\ne.avi\tbrush hair\n"):
        found = read_split("list", videos, lists(tmp_path, train__txt=text))
        assert labels(found) == {"a b": "brush hair", "c,d": "wave, twice", "e": "brush hair"}
        assert found.classes == ["brush hair", "wave, twice"]


def test_lists_without_labels_and_absolute_paths(tmp_path, films):
    videos = films("a/one", "a/b c")
    for text in (f'{videos}/a/one.avi\n"{videos}/a/b c.avi"\n', 'a/one.avi\n"a/b c.avi"\n', 'path\na/one\n"a/b c"\n'):
        found = read_split("list", videos, lists(tmp_path, train__txt=text))
        assert labels(found) == {"a/one": None, "a/b c": None} and found.classes == []


@pytest.mark.parametrize(("text", "words"), [
    ("a.avi 1\nb.avi\n", r"train\.txt, entry 2 \(b\.avi\) is not"),
    ("a.avi 300 1\nb.avi 1\nc.avi 1\n", r"entry 1 \(a\.avi 300 1\)"),
    ("a.avi,wave, twice\nb.avi,run\n", r"entry 1 \(a\.avi,wave, twice\).*needs quotes"),
    ("x.avi 1\n", "none of the 1 videos of list's train list"), ("", r"train\.txt names no video; it takes"),
        ("\n \n", r"train\.txt names no video")])
def test_lists_that_are_none(tmp_path, films, text, words):
    videos = films("a", "b")
    with pytest.raises(BadInput, match=words):
        read_split("list", videos, lists(tmp_path, train__txt=text))


# --- folders ---------------------------------------------------------------------------------------------------------
def test_a_class_called_train_is_not_guessed(films):
    videos = films("car/a", "plane/b", "train/c")
    with pytest.raises(BadInput, match=r"holds train/ beside car/, plane/: a class, or a part of the data\? Rename"):
        read_split("folder", videos)


@pytest.mark.parametrize(("train", "test"), [("Train", "TEST"), ("training", "Val"), ("TRAIN", "validation")])
def test_parts_are_found_in_any_case_and_said(films, train, test):
    videos = films(f"{train}/run/a", f"{train}/sit/b", f"{test}/run/c", "loose")
    both = [read_split("folder", videos, subset=subset) for subset in ("train", "test")]
    assert labels(both[0]) == {f"{train}/run/a": "run", f"{train}/sit/b": "sit"}
    assert labels(both[1]) == {f"{test}/run/c": "run"}
    assert both[0].notes[0] == f"train: 2 videos below {train}/, of 2 classes (run, sit)"
    assert both[1].notes[0] == f"test: 1 videos below {test}/, of 1 classes (run)"
    assert "passed over: 1 videos outside of" in both[0].notes[1]


def test_a_third_part_is_named(films):
    videos = films("train/run/a", "val/run/b", "test/run/c")
    found = read_split("folder", videos, subset="test")
    assert labels(found) == {"test/run/c": "run"} and "passed over: val/" in found.notes
    assert labels(read_split("k400", videos, subset="test")) == {"val/run/b": "run"}


def test_parts_of_one_name_and_absent_parts_are_refused(tmp_path, films):
    videos = films("train/run/a", "Train/run/b")
    with pytest.raises(BadInput, match="holds Train/ and train/; which is it"):
        read_split("folder", videos)
    film(tmp_path / "only" / "test" / "run" / "a.avi", numbered(3))
    with pytest.raises(BadInput, match="has no folder train/"):
        read_split("folder", tmp_path / "only")


def test_evaluation_on_a_list_without_labels_says_where_they_go(tmp_path, films):
    videos, splits = films("a/x", "a/y"), lists(tmp_path, train__csv="a/x.avi\na/y.avi\n")
    settings = SimpleNamespace(dataset="list", videos=videos, splits=splits, command="retrieval")
    with pytest.raises(BadInput, match=r"has no labels, which retrieval needs: give each path in .*lists its label"):
        evaluate.labelled_videos(SimpleNamespace(s=settings, rank=0, films=None, store=None, rgb=None), 1, "train")

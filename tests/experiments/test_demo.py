"""The end of the demo: its two sentences follow from the numbers."""

import json

import pytest

from experiments import demo


def result(rgb):
    return {"rgb": {"R@1": rgb, "R@1 chance": 10.0, "R@1 standard error": 3.4}}


@pytest.mark.parametrize(("after", "words"), [(66.5, "it learned what moves"), (22.8, "it learned what moves"),
                                              (22.6, "in this run RGB did not learn"), (8.0, "RGB did not learn")])
def test_rgb_learned_where_it_is_three_standard_errors_above_the_untrained_network(after, words):
    text = demo.meaning(result(12.5), result(after))
    assert words in text and f"for {after:.0f} of 100 queries" in text and "finds 12 and chance 10" in text


def test_the_table_the_meaning_and_the_page(tmp_path, capsys):
    committed = json.loads(demo.SEP.read_text())
    for name, method in (("untrained", "untrained"), ("goca", "goca")):
        protocol = {**committed["protocol"], "method": method}
        (tmp_path / f"{name}.json").write_text(json.dumps({**committed, "protocol": protocol}))
    assert demo.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("\nsep") == 3 and out.count("\ngoca") == 3 and "RGB did not learn" in out
    assert out.strip().endswith(f"open it in a browser: {tmp_path / 'index.html'}")

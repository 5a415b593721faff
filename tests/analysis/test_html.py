from __future__ import annotations

import builtins
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from pycompress.analysis import compare, report
from pycompress.nn.base import set_note


def net(width=8):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    model.add_module("<script>$x_{alert}(1)$&", nn.Linear(2, 2))
    set_note(model[0], "a < b & \"c\" <img src=x onerror='alert(1)'>")
    return model


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.words.append(data)


def check(text):
    """Well-formed, and nothing in it runs or loads anything."""
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), value
        assert "http" not in (value or "") or name.startswith("xmlns"), (name, value)
    assert re.findall(r"url\((?!#)", text) == []
    assert "@import" not in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    return page


def test_a_report_is_one_self_contained_page(tmp_path):
    pytest.importorskip("matplotlib")
    path = report(net(), X, budget=0).html(tmp_path / "r.html")
    text = path.read_text(encoding="utf-8")
    page = check(text)
    assert page.tags.count("svg") == 3
    assert "<script>" not in text
    words = "".join(page.words)
    assert "<script>$x_{alert}(1)$&" in words
    assert "a < b & \"c\" <img src=x onerror='alert(1)'>" in words
    assert "prefers-color-scheme: dark" in text and "viewport" in text
    assert "#010203" not in text and "#040506" not in text
    assert list(tmp_path.iterdir()) == [path]


def test_an_unmeasured_report_and_many_layers(tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    text = report(model, X, measure=False).html(tmp_path / "r.html", title="<b>T</b>").read_text()
    page = check(text)
    assert "(30 others)" in "".join(page.words)
    assert "<title>&lt;b&gt;T&lt;/b&gt;</title>" in text
    assert "Milliseconds" not in text


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    text = report(net(), X, measure=False).html(tmp_path / "r.html").read_text()
    check(text)
    assert "<svg" not in text
    assert "Plots need matplotlib" in text


def test_a_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report(net(), X, measure=False).html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_compare(tmp_path):
    teacher = report(net(80), X, budget=0)
    found = compare(
        [("teacher", teacher), ("student", net(3))], X, extra={"accuracy": {"student": 0.987}, "file": ["1 MB", None]}, budget=0
    )
    header, _, first, second = found.text().splitlines()
    assert header.split() == ["model", "accuracy", "file", "params", "bytes", "smaller", "MACs", "non-zero", "ms", "faster"]
    assert first.split()[:3] == ["teacher", "1", "MB"]
    assert second.split()[:2] == ["student", "0.987"]
    ratio = teacher.bytes / found.reports[1][1].bytes
    assert f"{ratio:.3g}x" in second
    page = check(found.html(tmp_path / "c.html").read_text())
    words = "".join(page.words)
    assert "teacher" in words and "student" in words and "0.987" in words
    data = json.loads(found.to_json())
    assert [entry["name"] for entry in data] == ["teacher", "student"]
    assert data[1]["extra"] == {"accuracy": 0.987, "file": None}
    assert data[0]["report"]["params"] == teacher.params


def test_compare_without_times():
    found = compare({"a": net(), "b": net()}, X, measure=False)
    assert "ms" not in found.headers()
    assert found.rows()[1][3] == "1x"


@pytest.mark.parametrize(
    "models, extra, error, text",
    [
        ([], None, ValueError, "at least one model"),
        ([("a", net()), ("a", net())], None, ValueError, "different names, got 'a' twice"),
        ([("a", 3)], None, TypeError, "must be torch.nn.Module or Report, got int for 'a'"),
        ([("a", net())], {"acc": [1, 2]}, ValueError, r"extra\['acc'\] must have 1 values, got 2"),
        ([("a", net())], {"acc": {"b": 1}}, ValueError, r"extra\['acc'\] must have keys out of \['a'\], got 'b'"),
        ([("a", net())], {"acc": [[]]}, TypeError, r"extra\['acc'\] must hold numbers, strings or None, got list"),
    ],
)
def test_compare_bad_arguments(models, extra, error, text):
    with pytest.raises(error, match=text):
        compare(models, X, extra=extra, measure=False)

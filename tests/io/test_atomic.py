from __future__ import annotations

import os
import stat

import pytest

from pycompress.atomic import atomic_path


def test_a_new_file_and_an_old_one(tmp_path):
    path = tmp_path / "f.txt"
    for text in ("first", "second"):
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["f.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links as POSIX has them")
def test_permissions_and_links_stay(tmp_path):
    path, link = tmp_path / "f.txt", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        with atomic_path(path) as temporary:
            temporary.unlink()  # a writer may replace the file by one of its own, with other permissions
            temporary.write_text("new")
            os.chmod(temporary, 0o600)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    os.chmod(path, 0o604)
    link.symlink_to(path)
    with atomic_path(link) as temporary:
        temporary.write_text("newer")
    assert link.is_symlink() and path.read_text() == "newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_impossible_places(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory, expected the name of a file"), atomic_path(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "none" / "f"):
        pass

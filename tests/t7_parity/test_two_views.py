"""What is done through one mount shows at once through another mount of the same source, and in the source itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.host import Host
from t7_parity import snapshot

Views = list[Path]


@pytest.fixture(params=["one host", "two hosts"])
def views(request: pytest.FixtureRequest, make_host: Callable[..., Host], storage: Path, tmp_path: Path) -> Views:
    """Two mounts and the source itself.  The backend excludes nobody, since the point here is what is seen."""
    first = make_host()
    second = first if request.param == "one host" else make_host()
    return [
        first.mount(storage, tmp_path / "view-1", "backend=nop").path,
        second.mount(storage, tmp_path / "view-2", "backend=nop").path,
        storage,
    ]


def pairs(views: Views) -> list[tuple[Path, Path]]:
    """Every way of doing something in one place and looking in another."""
    return [(here, there) for here in views for there in views if here != there]


def test_names_show_at_once(views: Views) -> None:
    for here, there in pairs(views):
        with pytest.raises(FileNotFoundError):
            os.stat(there / "it")
        (here / "it").write_bytes(b"x")
        assert os.listdir(there) == ["it"]
        os.rename(here / "it", here / "other")
        assert not (there / "it").exists()
        assert (there / "other").exists()
        os.unlink(here / "other")
        assert not (there / "other").exists()
        assert os.listdir(there) == []


def test_a_name_that_becomes_another_kind_of_file(views: Views) -> None:
    for here, there in pairs(views):
        (here / "it").write_bytes(b"x")
        assert (there / "it").is_file()
        os.unlink(here / "it")
        os.mkdir(here / "it")
        assert (there / "it").is_dir()
        (there / "it" / "inside").write_bytes(b"y")
        assert (here / "it" / "inside").read_bytes() == b"y"
        os.unlink(here / "it" / "inside")
        os.rmdir(there / "it")
        os.symlink("target", here / "it")
        assert os.readlink(there / "it") == "target"
        os.unlink(there / "it")


def test_attributes_show_at_once(views: Views) -> None:
    (views[2] / "it").write_bytes(b"0123456789")
    for number, (here, there) in enumerate(pairs(views)):
        mode, size = 0o600 + number, 100 * number + 7
        os.stat(there / "it")
        os.chmod(here / "it", mode)
        assert os.stat(there / "it").st_mode & 0o7777 == mode
        os.truncate(here / "it", size)
        assert os.stat(there / "it").st_size == size
        os.utime(here / "it", ns=(number, number + 1))
        assert os.stat(there / "it").st_mtime_ns == number + 1
        os.setxattr(here / "it", "user.x", bytes([number]))
        assert os.getxattr(there / "it", "user.x") == bytes([number])
        os.chown(here / "it", number, number)
        assert os.stat(there / "it").st_uid == number


def test_content_shows_at_once(views: Views) -> None:
    (views[2] / "it").write_bytes(b"0123456789")
    for number, (here, there) in enumerate(pairs(views)):
        writing, reading = os.open(here / "it", os.O_RDWR), os.open(there / "it", os.O_RDONLY)
        try:
            for step in range(20):
                data = b"%d-%d." % (number, step)
                os.pwrite(writing, data, 0)
                assert os.pread(reading, len(data), 0) == data
                end = os.lseek(writing, 0, os.SEEK_END)
                os.write(writing, data)
                assert os.fstat(reading).st_size == end + len(data)
                assert os.lseek(reading, 0, os.SEEK_END) == end + len(data)
                assert os.pread(reading, 100, end) == data
        finally:
            os.close(writing)
            os.close(reading)


def test_an_open_file_follows_its_name(views: Views) -> None:
    for here, there in pairs(views):
        (here / "it").write_bytes(b"content")
        with open(there / "it", "rb", buffering=0) as reading:
            os.rename(here / "it", here / "renamed")
            assert reading.read() == b"content"
            os.unlink(here / "renamed")
            assert os.fstat(reading.fileno()).st_nlink == 0
            reading.seek(0)
            assert reading.read() == b"content"


def test_hard_links_meet_across_mounts(views: Views) -> None:
    for here, there in pairs(views):
        (here / "first").write_bytes(b"x")
        os.link(there / "first", there / "second")
        assert os.stat(here / "first").st_nlink == 2
        assert os.path.samefile(here / "first", here / "second")
        (here / "second").write_bytes(b"changed")
        assert (there / "first").read_bytes() == b"changed"
        os.unlink(here / "first")
        os.unlink(there / "second")


def test_all_see_the_same_tree(views: Views) -> None:
    for number, view in enumerate(views):
        os.makedirs(view / f"d{number}" / "sub")
        (view / f"d{number}" / "file").write_bytes(bytes(number * 1000))
        os.symlink("file", view / f"d{number}" / "link")
        os.mkfifo(view / f"d{number}" / "fifo")
    trees = [snapshot.tree(view) for view in views]
    assert trees[0] == trees[1] == trees[2]
    for view in views[:2]:
        assert snapshot.views(view, views[2]) == []

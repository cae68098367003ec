"""The suite notices what it is there to notice: each difference is planted here, in two plain directories."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from t7_parity.record import Recorder
from t7_parity.registry import Case
from t7_parity.things import OLD, become, write
from t7_parity.twins import Difference, Pair, compare

Step = Callable[[Recorder], object]


def on_the_mount(step: Step) -> Callable[[Recorder], None]:
    """A case that makes a file and then does *step*, but only in the directory that stands for the mount."""

    def body(r: Recorder) -> None:
        write("it", b"0123456789")
        os.utime("it", ns=(OLD[0], OLD[0]))
        os.setxattr("it", "user.x", b"1")
        if "view" in os.getcwd():
            step(r)

    return body


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two plain directories."""
    for name in ("plain", "view"):
        (tmp_path / name).mkdir()
    plain, view = tmp_path / "plain", tmp_path / "view"
    return Pair(plain, view, view, plain, view)


PLANTED: dict[str, Step] = {
    "a mode": lambda r: os.chmod("it", 0o600),
    "an owner": lambda r: os.chown("it", 1, -1),
    "a group": lambda r: os.chown("it", -1, 1),
    "a size": lambda r: os.truncate("it", 9),
    "content": lambda r: os.pwrite(os.open("it", os.O_WRONLY), b"X", 3),
    "an explicit time": lambda r: os.utime("it", ns=(OLD[0], OLD[0] + 1)),
    "an attribute": lambda r: os.setxattr("it", "user.x", b"2"),
    "one attribute more": lambda r: os.setxattr("it", "user.y", b"1"),
    "a name": lambda r: os.rename("it", "other"),
    "a name more": lambda r: os.mkdir("other"),
    "a link": lambda r: os.link("it", "other"),
    "an outcome": lambda r: r("step", os.stat, "missing"),
    "a death": lambda r: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_noticed(pair: Pair, what: str) -> None:
    assert compare(Case("planted", on_the_mount(PLANTED[what])), pair, "it") != []


def test_twins_without_a_difference_are_equal(pair: Pair) -> None:
    assert compare(Case("none", on_the_mount(lambda r: None)), pair, "it") == []


def test_a_link_instead_of_a_copy_is_noticed(pair: Pair) -> None:
    def body(r: Recorder) -> None:
        write("a", b"x")
        write("b", b"x")
        if "view" in os.getcwd():
            os.unlink("b")
            os.link("a", "b")
            os.unlink("a")
            write("a", b"x")
            os.link("a", "c")
        else:
            os.link("b", "c")

    steps = {gap.step for gap in compare(Case("links", body), pair, "it")}
    assert "tree: hard links" in steps


def test_a_source_that_is_not_what_the_mount_shows_is_noticed(pair: Pair, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lying = Pair(pair.plain, pair.view, other, pair.plain, other)
    (pair.view / "it").mkdir()
    assert any(gap.step == "view" for gap in compare(Case("none", on_the_mount(lambda r: None)), lying, "it"))


def test_a_fault_of_the_case_is_no_difference_but_a_failure(pair: Pair) -> None:
    def body(r: Recorder) -> None:
        raise KeyError("a bug")

    with pytest.raises(AssertionError, match="the case itself failed"):
        compare(Case("broken", body), pair, "it")


def test_a_case_cannot_change_the_user_of_pytest(pair: Pair) -> None:
    assert compare(Case("user", lambda r: become(65534)), pair, "it") == []
    assert os.geteuid() == 0


def test_a_known_difference_holds_only_where_it_says() -> None:
    known = Difference("reason", ["opening.tmpfile[dir-*"], ["O_TMPFILE*"])
    assert known.covers("opening.tmpfile[dir-O_RDWR]", "O_TMPFILE write")
    assert not known.covers("opening.tmpfile[file-O_RDWR]", "O_TMPFILE write")
    assert not known.covers("opening.tmpfile[dir-O_RDWR]", "other")

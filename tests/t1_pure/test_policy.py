"""Which images are guarded, shared, pinned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.backend import Mode
from lockfs.fs.policy import Policy, compile_globs


def policy(images: str = "*", shared: str = "", pin: str = "") -> Policy:
    return Policy(
        {
            "images": tuple(filter(None, images.split(":"))),
            "shared": tuple(filter(None, shared.split(":"))),
            "pin": tuple(filter(None, pin.split(":"))),
        }
    )


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.img", b"a.img", True),
        ("*.img", b"dir/a.img", True),
        ("*.img", b"a.img.bak", False),
        ("*.img", b"new\nline.img", True),
        ("*.img", b"\xff\xfe.img", True),
        ("a?c", b"abc", True),
        ("a?c", b"a/c", False),
        ("vm/*.img", b"vm/a.img", True),
        ("vm/*.img", b"a.img", False),
        ("vm/*.img", b"vm/x/a.img", False),
        ("vm/**.img", b"vm/x/a.img", True),
        ("[ab].img", b"b.img", True),
        ("[!ab].img", b"b.img", False),
        ("[!ab].img", b"c.img", True),
        ("[]x].img", b"].img", True),
        ("[x.img", b"[x.img", True),
        ("a+b", b"a+b", True),
        ("a.b", b"axb", False),
        ("disk", b"disk\n", False),
    ],
)
def test_globs(pattern: str, path: bytes, matches: bool) -> None:
    found = compile_globs([pattern])
    assert found is not None
    assert (found.match(path) is not None) is matches


def test_no_patterns_match_nothing() -> None:
    assert compile_globs([]) is None
    assert not policy(images="").guarded(b"a.img")


def test_a_name_that_is_not_utf8_is_matched_by_its_bytes() -> None:
    assert policy(images="\udcff*").guarded(b"\xffx")
    assert not policy(images="\udcff*").guarded(b"\xfex")


def test_writers_are_exclusive_but_for_shared_images() -> None:
    rules = policy(shared="*.shared:quorum/*")
    assert rules.writer(b"a.img") is Mode.EXCLUSIVE
    assert rules.writer(b"x/a.shared") is Mode.SHARED
    assert rules.writer(b"quorum/q") is Mode.SHARED


def test_pin_wins_over_shared() -> None:
    rules = policy(shared="*.img", pin="base.img")
    assert rules.writer(b"base.img") is Mode.EXCLUSIVE
    assert rules.pinned(b"base.img")


def test_what_is_not_guarded_is_not_pinned() -> None:
    assert not policy(images="*.img", pin="*").pinned(b"a.txt")


@given(st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text), max_size=4), st.binary())
def test_any_pattern_compiles_or_is_refused_clearly(patterns: list[str], path: bytes) -> None:
    try:
        rules = Policy({"images": tuple(patterns), "shared": (), "pin": ()})
    except (ValueError, UnicodeEncodeError):
        return
    rules.guarded(path)

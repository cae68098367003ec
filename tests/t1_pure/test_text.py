"""Names as text: nothing is lost, nothing can be forged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockfs.text import from_bytes, to_bytes


@given(st.binary())
def test_every_name_comes_back(name: bytes) -> None:
    assert to_bytes(from_bytes(name)) == name


@given(st.binary())
def test_text_is_one_printable_line_that_any_encoding_of_unicode_takes(name: bytes) -> None:
    text = from_bytes(name)
    assert text.isprintable()
    assert text.encode().decode() == text


@given(st.binary(), st.binary())
def test_no_two_names_look_alike(one: bytes, other: bytes) -> None:
    assert (from_bytes(one) == from_bytes(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain.img", "plain.img"),
        ("Bücher".encode(), "Bücher"),
        (b"new\nline", "new\\x0aline"),
        (b"back\\slash", "back\\\\slash"),
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"\x1b[31mred", "\\x1b[31mred"),
        ("right\u202eto left".encode(), "right\\xe2\\x80\\xaeto left"),
    ],
)
def test_examples(name: bytes, text: str) -> None:
    assert from_bytes(name) == text
    assert to_bytes(text) == name


@pytest.mark.parametrize("typed", ["C:\\images", "\\", "a\\xzz", "\\x4"])
def test_a_backslash_that_starts_no_escape_stands_for_itself(typed: str) -> None:
    assert to_bytes(typed) == typed.encode()

"""The manual pages: complete, and in markup that groff takes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lockfs import backend
from lockfs.cli import manual
from lockfs.options import OPTIONS

CHECKOUT = Path(__file__).parents[2]
OF_TESTS = {"LOCKFS_STEPS"}


@pytest.mark.parametrize("name", manual.PAGES)
def test_groff_takes_each_page(name: str) -> None:
    if not shutil.which("groff"):
        pytest.skip("groff is missing")
    page = str(manual.PAGES[name]())
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8"], input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert name.removesuffix(name[-2:]).upper() in done.stdout
    assert re.search(r"lockfs\S*\(\d\)", done.stdout.rpartition("SEE ALSO")[2])


def test_every_variable_is_told() -> None:
    sources = [each.read_text() for top in ("lockfs", "backends") for each in (CHECKOUT / top).rglob("*.py")]
    looked_at = {name for source in sources for name in re.findall(r'"(LOCKFS_[A-Z_]+)"', source)}
    assert looked_at - OF_TESTS == set(manual.ENVIRONMENT)


def test_every_option_is_told() -> None:
    page = str(manual.PAGES["mount.lockfs.8"]()).replace("\\-", "-")
    for option in [*OPTIONS, *(each for name in backend.installed() for each in backend.find(name).options)]:
        assert f"{option.name}={option.metavar}" in page


def test_every_command_is_told_also_those_of_backends() -> None:
    page = str(manual.PAGES["lockfs.8"]()).replace("\\-", "-")
    for command in ("who", "fence", "hosts confirm-dead", "lease repair"):
        assert f".B lockfs {command} " in page


def test_no_line_is_taken_for_markup(tmp_path: Path) -> None:
    page = manual.Page("x", 8, "a - b")
    page.text(".hidden\n'hidden\\")
    assert str(page).endswith(".PP\n\\&.hidden\n\\&'hidden\\e\n")


def test_pages_are_written(tmp_path: Path) -> None:
    manual.run(str(tmp_path))
    assert sorted(each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*.?")) == [
        "man5/lockfs.toml.5", "man8/lockfs-lockd.8", "man8/lockfs.8", "man8/mount.lockfs.8",
    ]  # fmt: skip

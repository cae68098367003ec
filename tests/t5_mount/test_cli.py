"""The lockfs command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.host import Host, Mount

from lockfs.cli import option_help, output

OK, USAGE, SYSTEM, HELD = 0, 1, 2, 4
README = Path(__file__).parents[2] / "README.md"


def error_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return what a command said when it failed with *code*."""
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("lockfs: ")
    assert "Traceback" not in done.stderr
    return done.stderr


# Command line -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["who"], ["status", "--bogus"], ["options", "a", "b"]])
def test_wrong_use(host: Host, arguments: list[str]) -> None:
    assert "--help shows how" in error_of(host.run("lockfs", *arguments), USAGE)


def test_help_and_version(host: Host) -> None:
    assert host.run("lockfs", "--version").stdout == "lockfs 0.1.0\n"
    text = host.run("lockfs", "--help").stdout
    assert all(command in text for command in ("who", "status", "locks", "options"))


def test_who_and_options_start_fast() -> None:
    code = (
        "import sys; from lockfs.cli import main, option_help, who; main.parser(['options']); option_help.tables();"
        "sys.exit(' '.join({'trio', 'pyfuse3'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_enough(host: Host) -> None:
    done = host.run("sh", "-c", f"{Path(sys.executable).parent}/lockfs options | true")
    assert (done.returncode, done.stderr) == (0, "")


# Options ------------------------------------------------------------------------------------------


def test_options(host: Host) -> None:
    everything = host.run("lockfs", "options").stdout
    assert "wait=SECONDS" in everything
    assert "lockspace=DIR" in everything
    only = host.run("lockfs", "options", "fcntl-lockd").stdout
    assert "lockspace=DIR" in only
    assert "wait=" not in only
    assert "Installed backends" in error_of(host.run("lockfs", "options", "zfs"), USAGE)


def test_the_table_in_the_readme_is_the_real_one() -> None:
    text = README.read_text()
    _, _, rest = text.partition("<!-- options: made by `lockfs options --markdown` -->\n")
    table, end, _ = rest.partition("<!-- end of options -->")
    assert end
    assert table == option_help.markdown(option_help.tables())


# No lockd -----------------------------------------------------------------------------------------


def test_that_no_lockd_runs_is_an_answer(host: Host) -> None:
    done = host.run("lockfs", "status")
    assert (done.returncode, done.stdout) == (OK, f"no lockd is running in {host.run_dir}: nothing is mounted\n")
    assert host.json("status") == {"running": False}
    assert host.json("locks") == {"running": False, "locks": []}
    assert host.run("lockfs", "locks").returncode == OK
    assert not host.processes()


def test_a_run_directory_that_is_not_there(host: Host, tmp_path: Path) -> None:
    done = host.run("lockfs", "--run-dir", tmp_path / "no", "status", "--json")
    assert json.loads(done.stdout) == {"running": False}
    assert not (tmp_path / "no").exists()


def test_the_run_directory_may_be_named_before_and_after(host: Host, mount: Mount, tmp_path: Path) -> None:
    for arguments in (["--run-dir", host.run_dir, "status"], ["status", "--run-dir", host.run_dir]):
        done = host.run("env", "LOCKFS_RUN_DIR=/nowhere", Path(sys.executable).parent / "lockfs", *arguments)
        assert str(mount.path) in done.stdout


# Status and locks ---------------------------------------------------------------------------------


def test_status(host: Host, mount: Mount) -> None:
    found = host.json("status")
    assert (found["running"], found["host"], found["pid"]) == (True, host.name, host.lockd())
    assert found["run_dir"] == str(host.run_dir)
    [listed] = found["mounts"]
    assert listed["pid"] == mount.daemon()
    told = listed["mount"]
    assert (told["source"], told["mountpoint"]) == (str(mount.source), str(mount.path))
    assert (told["backend"], told["options"]) == ("fcntl-lockd", {})
    text = host.run("lockfs", "status").stdout
    assert host.name in text
    header, row = text.splitlines()[1:]
    for name, value in (("MOUNTPOINT", mount.path), ("SOURCE", mount.source), ("BACKEND", "fcntl-lockd")):
        assert header.index(name) == row.index(str(value))


def test_locks(host: Host, mount: Mount) -> None:
    assert host.json("locks") == {"running": True, "locks": []}
    assert host.run("lockfs", "locks").stdout == "this host holds no image\n"
    with open(mount / "vm.img", "w") as image:
        [lock] = host.locks()
        assert lock["image"]["path"] == str(mount / "vm.img")
        assert lock["image"]["ino"] == os.stat(mount.source / "vm.img").st_ino
        assert (lock["mode"], lock["backend"], lock["token"]) == ("exclusive", "fcntl-lockd", None)
        [owner] = lock["owners"]
        assert owner["pid"] == os.getpid()
        assert owner["here"]
        text = host.run("lockfs", "locks").stdout
        assert str(mount / "vm.img") in text
        assert f"{os.getpid()} " in text
        assert not image.closed
    assert host.locks() == []


# Who ----------------------------------------------------------------------------------------------


def test_a_free_image(host: Host, mount: Mount) -> None:
    (mount / "vm.img").touch()
    done = host.run("lockfs", "who", mount / "vm.img", "--check")
    assert (done.returncode, done.stdout) == (OK, f"{mount / 'vm.img'}: free\n")
    assert host.json("who", mount / "vm.img") == {
        "images": [
            {
                "path": str(mount / "vm.img"),
                "state": "free",
                "holders": [],
                "image": str(mount / "vm.img"),
                "reason": "",
            }
        ]
    }


def test_a_held_image(host: Host, host_b: Host, mount: Mount, tmp_path: Path) -> None:
    other = host_b.mount(mount.source, tmp_path / "other")
    before = time.time()
    with open(mount / "vm.img", "w"):
        for asking, path, here in ((host, mount / "vm.img", True), (host_b, other / "vm.img", False)):
            [answer] = asking.json("who", path)["images"]
            assert answer["state"] == "held"
            [holder] = answer["holders"]
            assert (holder["host"], holder["pid"], holder["mode"]) == (host.name, os.getpid(), "exclusive")
            assert holder["here"] is here
            assert set(holder) == {"host", "mode", "pid", "command", "vm", "since", "path", "token", "here"}
            assert before - 1 <= holder["since"] <= time.time() + 1
            done = asking.run("lockfs", "who", path)
            assert done.returncode == OK
            assert f"{path}: held\n  host     {host.name}" in done.stdout
            assert ("(this host)" in done.stdout) is here
            assert asking.run("lockfs", "who", "--check", path).returncode == HELD
    assert host_b.run("lockfs", "who", "--check", other / "vm.img").returncode == OK


def test_a_path_behind_the_mount_is_found_on_it(host: Host, mount: Mount, tmp_path: Path) -> None:
    (mount / "dir").mkdir()
    with open(mount / "dir" / "vm.img", "w"):
        link = tmp_path / "link"
        link.symlink_to(mount.source)
        for path in (mount.source / "dir" / "vm.img", link / "dir" / "vm.img"):
            [answer] = host.json("who", path)["images"]
            assert (answer["path"], answer["image"]) == (str(path), str(mount / "dir" / "vm.img"))
            assert answer["state"] == "held"


def test_what_is_no_image(host: Host, storage: Path, tmp_path: Path) -> None:
    mount = host.mount(storage, tmp_path / "mnt", "images=*.img")
    (mount / "notes.txt").touch()
    for path in (mount / "notes.txt", mount.path):
        assert "is not a guarded image" in error_of(host.run("lockfs", "who", path), USAGE)
    assert "No such file" in error_of(host.run("lockfs", "who", mount / "no.img"), USAGE)
    assert "neither on a lockfs mount" in error_of(host.run("lockfs", "who", "/etc/passwd"), USAGE)


def test_many_images_of_which_one_is_missing(host: Host, mount: Mount) -> None:
    with open(mount / "a.img", "w"):
        done = host.run("lockfs", "who", "--check", mount / "no.img", mount / "a.img")
        assert done.returncode == USAGE
        assert "a.img: held" in done.stdout
        assert "no.img" in done.stderr
        done = host.run("lockfs", "who", "--check", "--json", mount / "no.img", mount / "a.img")
        assert done.returncode == USAGE
        missing, held = json.loads(done.stdout)["images"]
        assert "No such file" in missing["error"]
        assert held["state"] == "held"


def test_anybody_who_may_read_may_ask(host: Host, mount: Mount) -> None:
    with open(mount / "vm.img", "w"):
        os.chmod(mount / "vm.img", 0o644)
        for directory in [mount.path, *mount.path.parents]:
            if directory.stat().st_mode & 0o005 != 0o005:
                os.chmod(directory, 0o755)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lockfs.cli.main", "who", "--check", mount / "vm.img"],
            env=host.environment, capture_output=True, text=True, check=False, user=65534, group=65534, cwd="/",
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (HELD, "")
    assert host.name in done.stdout


def test_only_root_may_ask_lockd(host: Host, mount: Mount) -> None:
    os.chmod(host.run_dir, 0o700)
    for directory in host.run_dir.parents:
        if directory.stat().st_mode & 0o005 != 0o005:
            os.chmod(directory, 0o755)
    for command in ("status", "locks"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "lockfs.cli.main", command],
            env=host.environment, capture_output=True, text=True, check=False, user=65534, group=65534, cwd="/",
        )  # fmt: skip
        assert f"only root may ask lockd in {host.run_dir}" in error_of(done, USAGE)


# Printing -----------------------------------------------------------------------------------------


def test_nothing_steers_the_terminal() -> None:
    assert output.printable("a\x1b[31mb\nc\u202ed") == "a\\x1b[31mb\\nc\\u202ed"
    assert output.printable("Bücher") == "Bücher"


def test_no_colour_in_a_pipe_or_where_it_is_not_wanted(host: Host, mount: Mount) -> None:
    (mount / "vm.img").touch()
    command = f"{Path(sys.executable).parent}/lockfs who {mount.path}/vm.img"
    assert "\x1b" not in host.run("sh", "-c", command).stdout
    terminal = ["script", "-qec", command, "/dev/null"]
    assert "\x1b[32mfree" in host.run(*terminal).stdout
    assert "\x1b" not in host.run("env", "NO_COLOR=1", *terminal).stdout


@pytest.mark.parametrize(
    ("ago", "shown"),
    [(0, "(0 s ago)"), (59, "(59 s ago)"), (150, "(2 min ago)"), (8000, "(2 h ago)"), (4e5, "(4 d ago)")],
)
def test_how_long_ago(ago: float, shown: str) -> None:
    assert output.moment(time.time() - ago).endswith(shown)


def test_a_time_that_is_none() -> None:
    assert output.moment(0) == ""
    assert "1e+300" in output.moment(1e300)

"""The manual pages, made from the tables and parsers that the programs themselves use, in man(7) markup."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Iterable, Mapping

from lockfs import __version__, backend, config
from lockfs.cli import main, mount, option_help
from lockfs.errors import EXIT_CODES, EXIT_OK, SystemError_

ENVIRONMENT: Mapping[str, str] = {
    "LOCKFS_RUN_DIR": "run directory of lockd: its socket, its state, its log (default: /run/lockfs)",
    "LOCKFS_CONFIG": f"file of defaults for mount options, see lockfs.toml(5) (default: {config.PATH})",
    "LOCKFS_HOST": "name of this host for others (default: its node name)",
    "LOCKFS_LOG": "where daemons log: journal, file (below the run directory) or stderr (default: the journal, if any)",
    "LOCKFS_LOG_LEVEL": "from what level on daemons log, such as DEBUG (default: INFO)",
    "LOCKFS_IDLE_EXIT": "seconds after which lockd leaves when nothing is mounted; 0: never (default: 10)",
    "LOCKFS_RESTARTS": "how many times in a row lockd starts a mount daemon again that dies; 0: never (default: 10)",
    "LOCKFS_HANG": "seconds without a sign of life after which a daemon of lockfs counts as hung (default: 5)",
    "LOCKFS_KERNEL": "off: mounts do without the kernel module of lockfs, and all data goes through their daemons",
}
"""Each variable that the programs look at, but for those of tests."""

FILES: Mapping[str, str] = {
    config.PATH: "defaults for mount options, see lockfs.toml(5)",
    "/run/lockfs": "the run directory",
    "/run/lockfs/lockd.sock": "where lockd serves: varlink, interface io.lockfs.Lockd",
    "/run/lockfs/lockd.state": "what lockd's successor has to know",
    "/run/lockfs/vault.sock": "where the vault serves lockd",
    "/run/lockfs/log/lockd.log": "the log, where there is no journal",
    "SOURCE/.lockfs": "what hosts tell each other: notes about holders, leases; the mount does not show it",
}


class Page:
    """One page in man(7) markup, line by line."""

    def __init__(self, name: str, section: int, summary: str) -> None:
        self._lines = [f'.TH {name.upper()} {section} "" "lockfs {__version__}"']
        self.section("Name")
        self._lines.append(f"{_escaped(name)} \\- {_escaped(summary)}")

    def section(self, title: str) -> None:
        """Begin a section."""
        self._lines.append(f'.SH "{title.upper()}"')

    def text(self, text: str) -> None:
        """Add paragraphs, which empty lines divide."""
        for part in inspect.cleandoc(text).split("\n\n"):
            self._lines += [".PP", *map(_line, part.split("\n"))]

    def literal(self, text: str) -> None:
        """Add lines as they are."""
        self._lines += [".PP", ".nf", ".RS", *map(_line, text.rstrip("\n").split("\n")), ".RE", ".fi"]

    def items(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add terms with their meanings."""
        for term, meaning in pairs:
            self._lines += [".TP", f".B {_line(term)}", _line(meaning)]

    def below(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Add terms that belong to the last one."""
        self._lines.append(".RS")
        self.items(pairs)
        self._lines.append(".RE")

    def see(self, *others: str) -> None:
        """Add references to other pages."""
        self.section("See also")
        for number, other in enumerate(others, 1):
            name, _, section = other.rpartition(".")
            self._lines.append(f".BR {name} ({section}){',' if number < len(others) else ''}")

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")


def _line(text: str) -> str:
    # A line that begins with a dot or an apostrophe would be a request.
    return ("\\&" if text.startswith((".", "'")) else "") + _escaped(text)


def _command() -> Page:
    page = Page("lockfs", 8, "look at lockfs mounts and locks, and fence images")
    top = main.parser([each.name for each in backend.commands()])
    page.section("Synopsis")
    page.text("lockfs [--run-dir DIR] COMMAND ...")
    page.section("Description")
    page.text(
        "Shows who holds which disk image, on this host and on others, and cuts off who should not write any more. "
        "What it shows comes as JSON with --json, which is the stable form. To mount, see mount.lockfs(8)."
    )
    page.section("Commands")
    for name, command in _commands(top):
        page.items([(_usage(command, name), command.description or "")])
        page.below(_arguments(command))
    page.section("Exit status")
    page.items((str(code), meaning) for code, meaning in EXIT_CODES.items())
    _surroundings(page)
    page.see("mount.lockfs.8", "lockfs-lockd.8", "lockfs.toml.5")
    return page


def _commands(parser: argparse.ArgumentParser, above: str = "") -> Iterable[tuple[str, argparse.ArgumentParser]]:
    """Return each command with its full name, those with commands of their own before these."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help for each in action._choices_actions}
            for name, command in action.choices.items():
                summary = command.description or helps.get(name) or ""
                command.description = f"{summary[:1].upper()}{summary[1:].removesuffix('.')}."
                yield f"{above}{name}", command
                yield from _commands(command, f"{above}{name} ")


def _usage(parser: argparse.ArgumentParser, name: str) -> str:
    operands = [each for each in parser._actions if not each.option_strings]
    words = [_operand(parser, each) for each in operands if not isinstance(each, argparse._SubParsersAction)]
    return " ".join([f"lockfs {name}", "[OPTIONS]", *words])


def _operand(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    return formatter._format_args(action, (action.dest or "").upper())


def _arguments(parser: argparse.ArgumentParser) -> Iterable[tuple[str, str]]:
    for action in parser._actions:
        if action.help in (None, argparse.SUPPRESS) or isinstance(action, argparse._SubParsersAction):
            continue
        if action.dest in ("help", "run_dir", "json"):
            continue  # the same everywhere
        value = _operand(parser, action) if not action.option_strings or action.nargs != 0 else ""
        meaning = (action.help or "") % {"default": action.default, "prog": parser.prog}
        yield f"{', '.join(action.option_strings)} {value}".strip(), meaning


def _mount() -> Page:
    page = Page("mount.lockfs", 8, "mount a directory of disk images, each for one writer at a time")
    usage, _, rest = mount.USAGE.partition("\n\n")
    about, _, switches = rest.partition("\n\n")
    page.section("Synopsis")
    page.literal(f"mount -t lockfs [-o OPTIONS] SOURCE MOUNTPOINT\n{usage.removeprefix('Usage: ')}")
    page.section("Description")
    page.text(about)
    page.section("Switches")
    page.literal(switches)
    for title, known in option_help.tables():
        page.section(title.partition(" (")[0])
        page.items((option_help.typed(each), option_help.meaning(each)) for each in known)
    page.section("Exit status")
    page.items((str(code), meaning) for code, meaning in EXIT_CODES.items())
    _surroundings(page)
    page.see("lockfs.8", "lockfs.toml.5", "mount.8", "fstab.5")
    return page


def _lockd() -> Page:
    page = Page("lockfs-lockd", 8, "the daemon that holds this host's locks for all its lockfs mounts")
    page.section("Description")
    page.text(
        """
        One lockd runs for each host. The first mount starts it, or systemd does by its socket, and it leaves when the
        last mount is gone. It holds the locks by a backend, keeps what a mount daemon needs to be started again, and
        fences images. If it dies, the mounts start another one, and hand over what they hold.

        Beside it runs the vault, a small process that keeps copies of descriptors, so that nobody notices if lockd and
        a mount daemon die at the same time. It starts lockd where no mount does, and leaves together with it.
        """
    )
    page.section("Signals")
    page.items([
        ("SIGHUP", "replace itself by the version that is installed now, with every lock in place"),
        ("SIGTERM", "leave; mounts that are there start another one, and what it alone kept locked is fenced first"),
    ])  # fmt: skip
    _surroundings(page)
    page.see("lockfs.8", "mount.lockfs.8")
    return page


def _config() -> Page:
    page = Page("lockfs.toml", 5, "a host's own defaults for mount options of lockfs")
    text, _, example = (config.__doc__ or "").partition("\n\n")[2].partition("\n\n    ")
    page.section("Synopsis")
    page.text(config.PATH)
    page.section("Description")
    page.text(text)
    page.text("Values are strings, numbers, truth values, or lists of words. The options are those of mount.lockfs(8).")
    page.section("Example")
    page.literal(inspect.cleandoc("    " + example))
    page.see("mount.lockfs.8")
    return page


def _surroundings(page: Page) -> None:
    page.section("Environment")
    page.items(ENVIRONMENT.items())
    page.section("Files")
    page.items(FILES.items())


PAGES: Mapping[str, Callable[[], Page]] = {
    "lockfs.8": _command,
    "mount.lockfs.8": _mount,
    "lockfs-lockd.8": _lockd,
    "lockfs.toml.5": _config,
}


def run(directory: str) -> int:
    """Write all pages below *directory* (man8, man5), and return the exit code.  Raises `SystemError_`."""
    try:
        for name, make in PAGES.items():
            section = os.path.join(directory, f"man{name[-1]}")
            os.makedirs(section, exist_ok=True)
            with open(os.path.join(section, name), "w", encoding="utf-8") as file:
                file.write(str(make()))
    except OSError as error:
        raise SystemError_(f"the manual cannot be written to {directory}: {error.strerror}") from error
    return EXIT_OK


__all__ = ["ENVIRONMENT", "PAGES", "Page", "run"]

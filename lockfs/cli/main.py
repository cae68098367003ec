"""The ``lockfs`` command: look at mounts and locks, and fence images.

What it shows comes as JSON too, which is the stable form.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lockfs import __version__, backend
from lockfs.errors import EXIT_INTERRUPTED, EXIT_OK, LockfsError, UsageError
from lockfs.protocol.start import run_dir

EPILOG = "To mount: mount -t lockfs SOURCE MOUNTPOINT; mount.lockfs --help has the options."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UsageError(message, hint=f"{self.prog} --help shows how.")


def main() -> int:
    """Run the command and return its exit code."""
    try:
        code = _run(parser(sys.argv[1:]).parse_args())
        sys.stdout.flush()
        return code
    except LockfsError as error:
        print(f"lockfs: {error.message}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has seen enough; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of a command line of these words: commands of backends load only if they are among them."""
    common = Parser(add_help=False)
    common.add_argument(
        "--run-dir", default=argparse.SUPPRESS, metavar="DIR", help="run directory of lockd (default: LOCKFS_RUN_DIR)"
    )
    shown = Parser(add_help=False)
    shown.add_argument("--json", action="store_true", help="print JSON")
    top = Parser(prog="lockfs", description="Look at lockfs mounts and locks.", epilog=EPILOG, parents=[common])
    top.add_argument("--version", action="version", version=f"lockfs {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    who = commands.add_parser("who", parents=[common, shown], help="tell who holds an image, on whatever host")
    who.add_argument("image", nargs="+", help="path of an image, on a mount or in the directory behind one")
    who.add_argument("--check", action="store_true", help="exit with 4 if an image is held")
    commands.add_parser("status", parents=[common, shown], help="show the mounts of this host")
    commands.add_parser("locks", parents=[common, shown], help="show the images that this host holds")
    fence = commands.add_parser(
        "fence",
        parents=[common, shown],
        help="make every further I/O on what is open of an image fail",
        description="Make every further I/O on what is open of an image on this host fail, at once and for good. "
        "Processes that no error stops, such as have it mapped, are killed. The lock stays until the image is closed.",
    )
    fence.add_argument("image", nargs="*", help="path of an image when it was opened, as `lockfs locks` shows it")
    fence.add_argument(
        "--inode", action="append", default=[], metavar="DEV:INO", help="an image by its numbers on the storage"
    )
    fence.add_argument("--reason", default="", metavar="TEXT", help="why, for the log and for who watches")
    hosts = commands.add_parser("hosts", parents=[common, shown], help="show the hosts that share locks with this one")
    doing = hosts.add_subparsers(dest="action", metavar="ACTION")
    dead = doing.add_parser(
        "confirm-dead",
        parents=[common, shown],
        help="say that a host is dead: what it held is free at once",
        description="Say that a host is dead, so that what it held is free now. Only you can know: if it still runs, "
        "two hosts write to one image. It is watched for a while, and refused if it is seen to live.",
    )
    dead.add_argument("host", help="its name or number, as `lockfs hosts` shows it")
    dead.add_argument("--source", default="", metavar="DIR", help="only for this source directory")
    dead.add_argument("--reason", default="", metavar="TEXT", help="why you are sure, for the log")
    upgrade = commands.add_parser(
        "upgrade",
        parents=[common, shown],
        help="replace the daemons of this host by this version",
        description="Replace lockd and all mount daemons by this version; every lock and every open file stays. "
        "If this version cannot read what they have written down, nothing is touched.",
    )
    upgrade.add_argument("--check", action="store_true", help="only see whether this version could take over")
    options = commands.add_parser("options", parents=[common], help="list the mount options")
    options.add_argument("backend", nargs="?", default="", metavar="BACKEND", help="only those of this backend")
    options.add_argument("--markdown", action="store_true", help="print a Markdown table")
    manual = commands.add_parser("manual", help="write the manual pages")
    manual.add_argument("directory", metavar="DIR", help="where, such as /usr/local/share/man")
    if not commands.choices.keys() & set(words):
        for each in backend.commands():
            added = commands.add_parser(each.name, help=each.summary, description=each.summary)
            if each.name in words:
                each.fill(added)
    return top


def _run(arguments: argparse.Namespace) -> int:
    # Each command imports what it needs: most take no event loop, and a question should be answered at once.
    if "run" in arguments:
        return int(arguments.run(arguments))
    directory = getattr(arguments, "run_dir", None) or run_dir()
    match arguments.command:
        case "who":
            from lockfs.cli import who

            return who.run(arguments.image, directory, as_json=arguments.json, check=arguments.check)
        case "status":
            from lockfs.cli import show

            return show.status(directory, as_json=arguments.json)
        case "locks":
            from lockfs.cli import show

            return show.locks(directory, as_json=arguments.json)
        case "hosts":
            from lockfs.cli import hosts

            if arguments.action is None:
                return hosts.run(directory, as_json=arguments.json)
            return hosts.confirm_dead(
                arguments.host, arguments.source, arguments.reason, directory, as_json=arguments.json
            )
        case "fence":
            from lockfs.cli import fence

            return fence.run(arguments.image, arguments.inode, arguments.reason, directory, as_json=arguments.json)
        case "upgrade":
            from lockfs.cli import upgrade

            return upgrade.check(directory) if arguments.check else upgrade.run(directory, as_json=arguments.json)
        case "manual":
            from lockfs.cli import manual

            return manual.run(arguments.directory)
        case _:
            from lockfs.cli import option_help

            tables = option_help.tables(arguments.backend)
            print(option_help.markdown(tables) if arguments.markdown else option_help.text(tables), end="")
            return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

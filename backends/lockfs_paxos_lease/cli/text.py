"""What `describe` says, for people."""

from __future__ import annotations

from collections.abc import Sequence

from lockfs.cli.output import columns, printable
from lockfs_paxos_lease.cli.describe import Document


def dump(areas: Sequence[Document], *, ballots: bool) -> str:
    """Return all that is known of areas; the ballots only if asked for."""
    return "".join(_area(each, ballots) for each in areas)


def _area(area: Document, ballots: bool) -> str:
    where = printable(area["path"]) + (f":{area['offset']}" if area["offset"] else "")
    match area["kind"]:
        case "lockspace":
            return f"{where}: lockspace {_name(area['lockspace'])}, {_timing(area)}, {_sizes(area)}\n" + _hosts(area)
        case "lease" | "deleted lease":
            return f"{where}: {area['kind']} {_name(area['name'])} of {_name(area['lockspace'])}\n" + _lease(
                area, ballots
            )
        case "index":
            head = f"{where}: index of the leases of {_name(area['lockspace'])}, room for {area['max_leases']}\n"
            rows = [(str(each["number"]), str(each["offset"]), _name(each["name"])) for each in area["leases"]]
            return head + columns([("NUMBER", "OFFSET", "LEASE"), *rows], indent="  ")
        case kind:
            return f"{where}: {'nothing' if kind == 'empty' else 'nothing that is known'}\n"


def _timing(area: Document) -> str:
    takeover = area["takeover"]
    return "sanlock's timing" if takeover == "sanlock" else f"takeover={takeover:g}"


def _sizes(area: Document) -> str:
    return f"sectors of {area['sector_size']}, areas of {area['align_size'] >> 20} MiB"


def _hosts(area: Document) -> str:
    if not area["hosts"]:
        return "  no host has been in it\n"
    rows = [("HOST", "NAME", "GENERATION", "RENEWED", "IO_TIMEOUT", "CALLS", "EVENT")]
    for host in area["hosts"]:
        event = host["event"]
        rows.append((
            str(host["host_id"]), _name(host["name"]), str(host["generation"]),
            "free" if host["free"] else f"{host['timestamp']:.10g}", str(host["io_timeout"]),
            " ".join(map(str, host["calls"])),
            f"{event['event']}/{event['data']:#x} for generation {event['generation']}" if event["event"] else "",
        ))  # fmt: skip
    return columns(rows, indent="  ")


def _lease(area: Document, ballots: bool) -> str:
    owner, written = area["owner"], area["written"]
    who = f"host {owner['host_id']} (generation {owner['generation']})"
    if area["held"]:
        state = f"held by {who} since {area['timestamp']:.10g}"
    elif area["shared_by"]:
        shares = (f"host {each['host_id']} (generation {each['generation']})" for each in area["shared_by"])
        state = f"shared by {', '.join(shares)}"
    else:
        state = "free" + (f", last held by {who}" if owner["host_id"] else "")
    rows = [("state", state), ("version", str(area["version"])), ("hosts up to", str(area["num_hosts"]))]
    if area["request"]["how"] or area["request"]["version"]:
        rows.append(("request", f"{area['request']['how'] or 'none'} for version {area['request']['version']}"))
    if written["host_id"]:
        rows.append(("written by", f"host {written['host_id']} (generation {written['generation']})"))
    return columns(rows, indent="  ") + (_ballots(area) if ballots and area["ballots"] else "")


def _ballots(area: Document) -> str:
    names = ("mbal", "bal", "inp", "inp2", "inp3", "lver")
    rows = [("HOST", *(name.upper() for name in names), "CHECKSUM", "")]
    for each in area["ballots"]:
        marks = [word for word, on in (("released", each["released"]), ("BAD", not each["valid"])) if on]
        numbers = (str(each[name]) for name in names)
        rows.append((str(each["host_id"]), *numbers, f"{each['checksum']:#010x}", " ".join(marks)))
    return columns(rows, indent="  ")


def listing(leases: Sequence[Document]) -> str:
    """Return leases, one a line."""
    if not leases:
        return "there are no leases\n"
    rows = [("LEASE", "STATE", "HOST", "VERSION", "PLACE")]
    for each in leases:
        hosts = [each["owner"]["host_id"]] if each["held"] else [share["host_id"] for share in each["shared_by"]]
        state = "held" if each["held"] else "shared" if hosts else "free"
        where = printable(each["path"]) + (f":{each['offset']}" if each["offset"] else "")
        rows.append((_name(each["name"]), state, " ".join(map(str, hosts)), str(each["version"]), where))
    return columns(rows)


def _name(text: str) -> str:
    return printable(text) or "-"

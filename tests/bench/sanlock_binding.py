"""A client of a sanlock daemon by its Python binding, as a program of its own: the binding is one of the system's Python.

It joins a lockspace, says how long that took, and answers each line of its input, with how long it took in seconds:
``cycle`` takes and gives back the lease, ``hold PATH NAME`` takes another one and keeps it.

Run as ``/usr/bin/python3 sanlock_binding.py LOCKSPACE HOST_ID LOCKSPACE_PATH IO_TIMEOUT LEASE_NAME LEASE_PATH``.
"""

import sys
import time

import sanlock  # type: ignore[import-not-found]


def main(space: str, host_id: str, space_path: str, io_timeout: str, name: str, path: str) -> None:
    """Serve until the input ends."""
    began = time.perf_counter()
    sanlock.add_lockspace(space.encode(), int(host_id), space_path, iotimeout=int(io_timeout))
    print(time.perf_counter() - began, flush=True)
    connection = sanlock.register()
    for line in sys.stdin:
        what, *arguments = line.split()
        began = time.perf_counter()
        if what == "hold":
            sanlock.acquire(space.encode(), arguments[1].encode(), [(arguments[0], 0)], slkfd=connection)
            print(time.perf_counter() - began, flush=True)
        else:
            sanlock.acquire(space.encode(), name.encode(), [(path, 0)], slkfd=connection)
            middle = time.perf_counter()
            sanlock.release(space.encode(), name.encode(), [(path, 0)], slkfd=connection)
            print(middle - began, time.perf_counter() - middle, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

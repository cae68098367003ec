"""A client of a running sanlock daemon, by its socket protocol; it needs no library of sanlock.

`wire` is what goes over the socket, as pure code; `errors` what the daemon answers when it refuses; `client` talks.
"""

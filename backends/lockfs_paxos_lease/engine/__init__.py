"""The protocol of `paxos-lease`, without I/O: state machines over *read sectors, write sector, time passed*.

Nothing here imports trio or os, sleeps, or looks at a clock of its own; `engine.actions` says how it is driven.

=============  =========================================================================================
`actions`      what an operation asks of the world, and what it may be told
`errors`       how an operation ends when it does not succeed
`timing`       every delay, interval and time-out
`hosts`        what this host has seen of the others: the watch, and who is dead
`records`      the records of a lockspace on the disk
`membership`   this host's own delta lease: join, resume, renew, leave
`census`       how far host ids are in use, and so how far a lease has to be read
`ballot`       one ballot of disk paxos
`area`         the records of a lease on the disk
`owner`        whether the owner of a lease is still there
`attempt`      what an attempt to get a lease wishes and has seen
`own`          what is ours of a lease on the disk
`lease`        one paxos lease: acquire, release, convert, take up from a predecessor, tidy up
`requests`     asking an owner to let go; who has a lease
=============  =========================================================================================
"""

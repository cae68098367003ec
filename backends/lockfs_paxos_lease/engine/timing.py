"""Every delay, interval and time-out of the protocol, in seconds, from one number.

The life of a host's own lease, counted by its holder from *before* the renewal was written, by a contender from *after*
the renewal was seen:

    renewal       renewal           fence (L)           dead
    ───┼─────────────┼── ... ──────────┼──── margin ──────┼──────►
       due every `renewal`             holder stops       others may take over

The margin is what clocks of different speed, writes still under way at L, and the fencing itself may take in all.

sanlock's timing (``Timing.sanlock(T)``, T its io_timeout): due 2T, L = 8T, dead 8T + 60; T=10: 20, 80, 140.  A
contender goes by the T that it finds in the record of the host that it judges.

Own timing (``Timing.own(S)``, S the time within which a dead host's leases can be had): due S/8, L = S/2, dead 3S/4.
The worst case is a host that dies directly after a renewal which the contender's next look, up to S/8 later, shows:
S/8 + 3S/4 + S/32 (a look at the owner) = 0.906 S; the rest is for the I/O.  For S = 16:

    0.0   last renewal of a host that dies now        2.0   another host sees it, at the latest
    8.0   L: had it lived, it would have fenced       14.0  dead        14.5  the next acquire takes over

Clocks may differ in speed by a third before L on the slower one reaches `dead` on the faster one.
All hosts of a lockspace must agree on the timing, so every record carries it in its version word (`format.version`).
"""

from __future__ import annotations

from dataclasses import dataclass

from lockfs_paxos_lease.format import version

WATCHDOG = 60
"""sanlock's W: seconds in which a watchdog resets a host that did not renew."""
DEFAULT_IO_TIMEOUT = 10
DEFAULT_TAKEOVER = 16.0
MIN_TAKEOVER = 2.0
_MASK = 0xFF


@dataclass(frozen=True, slots=True)
class Timing:
    """See the module.

    `units` is how many counts of a timestamp on the disk make a second; timestamps are compared for equality only, so
    they may be finer than sanlock's whole seconds where no sanlock reads them, and must be where renewals are.
    """

    io_timeout: float
    renewal: float
    fence: float
    retry: float
    """Between attempts at a renewal that failed."""
    poll: float
    """Between looks at an owner that may be dead."""
    backoff: float
    """The longest pause between two ballots."""
    settle: float
    """How long a claim of a free host id stands before it is believed, by own timing."""
    own_dead: float
    """`dead` by own timing; 0: sanlock's timing."""
    units: int
    stored: int
    """What goes into the field io_timeout of a delta record."""
    delta_version: int
    lease_version: int

    @classmethod
    def sanlock(cls, io_timeout: int = DEFAULT_IO_TIMEOUT) -> Timing:
        """Return sanlock's timing.  Raises ValueError unless 1 <= *io_timeout* <= 255."""
        if not 1 <= io_timeout <= _MASK:
            raise ValueError(f"io_timeout is from 1 to {_MASK} seconds, not {io_timeout}")
        t = io_timeout
        return cls(
            io_timeout=t, renewal=2 * t, fence=8 * t, retry=0.5, poll=1.0, backoff=1.0, settle=0.0, own_dead=0.0,
            units=1, stored=t, delta_version=version.DELTA, lease_version=version.PAXOS,
        )  # fmt: skip

    @classmethod
    def own(cls, takeover: float = DEFAULT_TAKEOVER) -> Timing:
        """Return the timing in which a dead host's leases can be had within *takeover* seconds.  Raises ValueError."""
        if not MIN_TAKEOVER <= takeover <= version.MAX_TAKEOVER:
            raise ValueError(f"takeover is from {MIN_TAKEOVER:g} to {version.MAX_TAKEOVER:g} seconds, not {takeover:g}")
        s, word = round(takeover * version.TENTHS) / version.TENTHS, version.own(takeover)
        return cls(
            io_timeout=s / 8, renewal=s / 8, fence=s / 2, retry=s / 64, poll=s / 32, backoff=s / 64, settle=s / 32,
            own_dead=s * 3 / 4, units=1000, stored=max(1, round(s / 8)), delta_version=word, lease_version=word,
        )  # fmt: skip

    @property
    def is_sanlock(self) -> bool:
        """True for sanlock's timing."""
        return not self.own_dead

    @property
    def margin(self) -> float:
        """Between this host's L and the moment at which others may take over."""
        return self.dead_after(self.stored) - self.fence

    def dead_after(self, stored: int) -> float:
        """Return after how long without a change a host is dead whose record has io_timeout *stored*."""
        return self.own_dead or 8 * ((stored & _MASK) or self.io_timeout) + WATCHDOG

    def live_for(self, stored: int) -> float:
        """Return how long after a change a host still counts as live: its L."""
        return self.fence if self.own_dead else 8 * ((stored & _MASK) or self.io_timeout)

    def long_delay(self, stored: int) -> float:
        """Return how long a claimed host id must stand still before it may be taken."""
        return self.dead_after(stored)

    def short_delay(self, stored: int) -> float:
        """Return how long a new claim must stand before it is believed."""
        return self.settle or 2 * ((stored & _MASK) or self.io_timeout)

    @property
    def quickest(self) -> float:
        """The least that any host of the lockspace waits between the claim of a free host id and its first use.

        By sanlock's rules 2 io_timeout, of a host that is not known yet: that is at least 1.
        """
        return self.settle or 2.0

    def stamp(self, now: float) -> int:
        """Return the time *now* as a record has it; never 0, which says *free*."""
        return max(1, int(now * self.units))

    def seconds(self, stamp: int) -> float:
        """Return the time that a record of this very boot says; not later than when it was stamped."""
        return stamp / self.units

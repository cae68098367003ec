"""When a watchdog is armed, fed and disarmed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lockfs_paxos_lease import watchdog
from lockfs_paxos_lease.engine.timing import Timing

from lockfs.errors import MountError


@dataclass
class FakeDevice:
    """A watchdog on paper; `nowayout` as some are told."""

    nowayout: bool = False
    calls: list[str] = field(default_factory=list)

    def arm(self, timeout: int) -> None:
        self.calls.append(f"arm {timeout}")

    def feed(self) -> None:
        self.calls.append("feed")

    def disarm(self) -> bool:
        self.calls.append("disarm")
        return not self.nowayout

    def done(self) -> list[str]:
        done, self.calls = self.calls, []
        return done


def armed(device: FakeDevice, takeover: float = 16) -> watchdog.Watchdog:
    made = watchdog.Watchdog(device, Timing.own(takeover))
    made.arm()
    return made


@pytest.mark.parametrize(
    "timing", [Timing.own(3), Timing.own(16), Timing.own(600), Timing.sanlock(10), Timing.sanlock(1)]
)
def test_the_reset_comes_after_the_fence_was_due_and_before_others_take_over(timing: Timing) -> None:
    device = FakeDevice()
    watchdog.Watchdog(device, timing).arm()
    timeout = int(device.done()[0].split()[1])
    assert timeout + watchdog.FRESH < timing.dead_after(timing.stored)
    if timing.fence >= 4:
        assert timeout > timing.fence


def test_with_too_little_time_it_is_refused() -> None:
    with pytest.raises(MountError, match="3 seconds at least"):
        watchdog.Watchdog(FakeDevice(), Timing.own(2))


def test_nothing_happens_before_something_is_held() -> None:
    device = FakeDevice()
    made = watchdog.Watchdog(device, Timing.own(16))
    made.renewed(0.0)
    made.look(holding=False, at_stake=False)
    assert device.done() == []


def test_while_something_is_at_stake_only_renewals_feed_it() -> None:
    device = FakeDevice()
    made = armed(device)
    made.arm()
    assert device.done() == ["arm 11"]
    made.look(holding=True, at_stake=True)
    assert device.done() == []
    made.renewed(0.1)
    assert device.done() == ["feed"]
    made.renewed(watchdog.FRESH + 0.1)
    assert device.done() == []


def test_when_all_is_fenced_it_is_fed_although_nothing_is_renewed() -> None:
    device = FakeDevice()
    made = armed(device)
    device.done()
    made.look(holding=True, at_stake=False)
    assert device.done() == ["feed"]


def test_when_nothing_is_held_it_is_disarmed_and_armed_again_for_the_next() -> None:
    device = FakeDevice()
    made = armed(device)
    made.look(holding=False, at_stake=False)
    assert device.done() == ["arm 11", "feed", "disarm"]
    made.look(holding=False, at_stake=False)
    assert device.done() == []
    made.arm()
    assert device.done() == ["arm 11"]


def test_one_that_knows_no_way_out_is_fed_on() -> None:
    device = FakeDevice(nowayout=True)
    made = armed(device)
    made.look(holding=False, at_stake=False)
    device.done()
    made.look(holding=False, at_stake=False)
    assert device.done() == ["feed", "disarm"]
    assert made.armed


def test_what_is_no_device_is_refused(tmp_path: Path) -> None:
    assert watchdog.on("", Timing.own(16)) is None
    with pytest.raises(MountError, match="No such file"):
        watchdog.on(f"{tmp_path}/missing", Timing.own(16))
    (tmp_path / "file").write_text("")
    with pytest.raises(MountError, match="not a character device"):
        watchdog.on(f"{tmp_path}/file", Timing.own(16))

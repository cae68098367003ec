"""The command `tests/sim/run`."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time

from sim import mutants
from sim.claims import simulate_claims
from sim.scenario import Result, simulate


def main() -> int:
    """Run seeds; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="tests/sim/run", description="Simulate clusters that share leases.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first one (default 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="how many at a time (default 1)")
    parser.add_argument("--trace", action="store_true", help="print what happens")
    parser.add_argument("--claims", action="store_true", help="many hosts that want one host id")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="with this deliberate bug")
    parser.add_argument("--stop", action="store_true", help="end at the first seed that fails")
    args = parser.parse_args()
    gc.freeze()
    if args.mutant:
        mutants.MUTANTS[args.mutant].apply()
    story = simulate_claims if args.claims else simulate
    seeds = range(args.seed, args.seed + args.seeds)
    began = time.perf_counter()
    total = Result(0)
    failures = done = 0
    if args.jobs > 1:
        with multiprocessing.Pool(args.jobs) as pool:
            for result in pool.imap_unordered(story, seeds, chunksize=20):
                done += 1
                failures += _report(result, total, args)
                _tell(done, failures, began)
                if failures and args.stop:
                    break
    else:
        for seed in seeds:
            done += 1
            failures += _report(story(seed, trace=args.trace), total, args)
            _tell(done, failures, began)
            if failures and args.stop:
                break
    took = time.perf_counter() - began
    print(
        f"{done} seeds, {failures} failed, in {took:.1f} s ({1000 * took / max(done, 1):.1f} ms each): "
        f"{total.seconds / took:.0f} cluster-seconds per second\n"
        f"{total.grants} grants, {total.takeovers} takeovers, {total.refused} refusals, {total.joins} joins, "
        f"{total.resumes} resumed, {total.lost} leases lost, {total.crashes} crashes ({total.confirmed} confirmed), {total.data} data writes "
        f"({total.late} late), {total.retired} retired, {total.probes} probes, {total.steps} steps"
    )
    return 1 if failures else 0


def _tell(done: int, failures: int, began: float) -> None:
    """Say now and then how far it is: a long run may be cut short."""
    if done % 1000 == 0:
        print(f"{done} seeds, {failures} failed, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def _report(result: Result, total: Result, args: argparse.Namespace) -> int:
    for name in ("seconds", "grants", "takeovers", "data", "late", "joins", "resumes", "lost", "crashes", "confirmed", "refused",
                 "retired", "probes", "steps"):  # fmt: skip
        setattr(total, name, getattr(total, name) + getattr(result, name))
    for line in result.trace:
        print(line)
    if not result.failure:
        return 0
    mutant = (" --claims" if args.claims else "") + (f" --mutant {args.mutant}" if args.mutant else "")
    print(f"seed {result.seed} failed: {result.failure}\n    tests/sim/run --seed {result.seed} --trace{mutant}")
    sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Measures jobworker against its budget. Each row is a ratio: ours beside a limit or a peer, measured in the same run.

A row is a function that takes turns (ours, peer, ours, peer ...), so that what else goes on hits both alike and a slow
machine misses nothing that a quick one meets. The ratio is the median of the turns' ratios. Nothing of ours runs with
weaker durability than the default.

Load generators and scripted workers are processes of their own (`beside`), lean enough not to be what is measured.
Black box: of ours only server.py and client.py are run, as a user would.

    python checks/bench.py                  every row of the budget's table
    python checks/bench.py post-16 huey     these rows
    python checks/bench.py --list           the names of these rows
    python checks/bench.py --quick          each for a moment, only to see that it runs
    python checks/bench.py --peers          huey, dramatiq, celery and rq with the same work (installed if need be)
    python checks/bench.py --scale          with a million queued, a million finished, 1,000 workers, 300 listeners
    python checks/bench.py --long           a million jobs through a worker: what grows meanwhile
"""

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Callable

import bench_growth
import bench_peers
import bench_rows
from bench_ratio import HEAD, Ratio, SkippedError
from bench_stage import Bench

GROUPS: dict[str, dict[str, Callable[[Bench], list[Ratio]]]] = {
    "peers": bench_peers.ROWS,
    "scale": bench_growth.SCALE,
    "long": {"long": bench_growth.long},
}
ROWS = bench_rows.ROWS | {name: row for rows in GROUPS.values() for name, row in rows.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast jobworker is here, beside what else does the same.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="which rows these are")
    parser.add_argument("--quick", action="store_true", help="for a moment each, only to see that they run")
    for name, rows in GROUPS.items():
        parser.add_argument(f"--{name}", action="append_const", dest="groups", const=rows, help=" ".join(rows))
    options = parser.parse_args()
    options.rows += [name for rows in options.groups or () for name in rows]
    options.rows = options.rows or list(bench_rows.ROWS)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]}; there are: {', '.join(ROWS)}")
    return options


def measure(name: str, quick: bool) -> None:
    bench, title = Bench(quick), name
    try:
        with bench.row():
            for ratio in ROWS[name](bench):
                print(f"{title:<14}{ratio}", flush=True)
                title = ""
    except SkippedError as error:
        print(f"{name:<14}skipped: {error}", flush=True)


def main() -> int:
    options = arguments()
    if options.list:
        print("\n".join(options.rows))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    print(f"{time.strftime('%F')}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} when it began")
    print(f"{'row':<14}{HEAD}", flush=True)
    for name in options.rows:
        measure(name, options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())

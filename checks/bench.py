"""Measures jobworker against its budget, each figure beside a limit or a peer measured in the same run.

A row of the budget is a function that takes turns (ours, peer, ours, peer ...), so that what else goes on hits both
alike. Its figures are printed as medians with the least and the most of all turns; `ratio` is ours divided by that
line's. Nothing runs with weaker durability than the default; each line says how what it counts is kept.

Load generators and scripted workers are processes of their own (`beside`), lean enough not to be what is measured.
Black box: of ours only server.py and client.py are run, as a user would.

    python checks/bench.py                  every row
    python checks/bench.py post-16 idle     these rows
    python checks/bench.py --list           what rows there are
    python checks/bench.py --quick          each for a moment, only to see that it runs
    python checks/bench.py --peers          rq, celery, dramatiq and huey with the same work (installed if need be)
    python checks/bench.py --scale          with a million queued, a million finished, 1,000 workers, 300 listeners
    python checks/bench.py --long           a million jobs through a worker: what grows meanwhile
"""

import argparse
import resource
import signal
import sys
from collections.abc import Callable, Iterator

from bench_figure import Figure, number
from bench_growth import long, scale
from bench_peers import peers
from bench_rows import ROWS
from bench_stage import Bench, SkippedError

MORE: dict[str, Callable[[Bench], list[Figure]]] = {"peers": peers, "scale": scale, "long": long}


def table(name: str, figures: list[Figure]) -> Iterator[str]:
    ours = figures[0]
    for figure in figures:
        ours = ours if figure.is_limit else figure
        ratio = f"{ours.median / figure.median:.2f}" if figure.is_limit and figure.median else ""
        spread = f"{number(min(figure.samples))} .. {number(max(figure.samples))}"
        yield (
            f"{name if figure is figures[0] else '':<16}{figure.what:<48}{number(figure.median):>8} {figure.unit:<12}"
            f"{spread:<20}{ratio:>6}  {figure.budget:<18} {figure.kept}"
        ).rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast jobworker is here, beside what else does the same.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="these rows alone; --list names them")
    parser.add_argument("--list", action="store_true", help="which rows there are")
    parser.add_argument("--quick", action="store_true", help="for a moment each, only to see that they run")
    for name, function in MORE.items():
        parser.add_argument(f"--{name}", action="append_const", dest="more", const=name, help=function.__doc__)
    options = parser.parse_args()
    rows = ROWS | MORE
    if unknown := [name for name in options.rows if name not in rows]:
        parser.error(f"no row {unknown[0]}; there are: {', '.join(rows)}")
    if options.list:
        print("\n".join(rows))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    head = f"{'row':<16}{'what':<48}{'median':>8} {'':<12}{'min .. max':<20}{'ratio':>6}  {'budget':<18} how it is kept"
    print(head, flush=True)
    for name in options.rows or options.more or ROWS:
        bench = Bench(options.quick)
        with bench.row():
            try:
                print("\n".join(table(name, rows[name](bench))), flush=True)
            except SkippedError as error:
                print(f"{name:<16}skipped: {error}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

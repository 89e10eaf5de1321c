"""Measures pairs, interleaved, and shows them."""

import statistics
import time
from dataclasses import dataclass
from typing import Callable


@dataclass
class Row:
    """A pair, and what the ratio of their times is to be at most, or how many seconds ours may add."""

    what: str
    ours: Callable
    rival_name: str
    rival: Callable
    reach: float | None = None
    aim: float | None = None
    most_added: float | None = None

    def verdict(self, ratio: float, added: float) -> str:
        """The best goal that was come to."""
        if self.most_added is not None:
            word = "reached" if added <= self.most_added else "NOT REACHED"
            return f"{word}: adds {human(added)} of {human(self.most_added)}"
        if self.reach is None:
            return ""
        if self.aim is not None and ratio <= self.aim:
            return "aim"
        return "reached" if ratio <= self.reach else "NOT REACHED"


def measure(function) -> float:
    """Seconds for one call; what has to be made ready before and cleared away after is not counted. A function may say
    itself how long it took."""
    getattr(function, "prepare", lambda: None)()
    started = time.perf_counter()
    said = function()
    seconds = said if isinstance(said, float) else time.perf_counter() - started
    getattr(function, "finish", lambda: None)()
    return seconds


def spread(times: list[float]) -> float:
    """Half of the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def run(table: list[Row], rounds: int) -> list[dict]:
    times = [([], []) for _ in table]
    for row in table:
        measure(row.ours)
        measure(row.rival)
    for number in range(rounds):
        for row, (mine, theirs) in zip(table, times):
            # Who goes first changes, since the first one warms the caches.
            pairs = [(row.ours, mine), (row.rival, theirs)]
            for function, into in pairs if number % 2 == 0 else reversed(pairs):
                into.append(measure(function))
    results = []
    for row, (mine, theirs) in zip(table, times):
        ratio = statistics.median(mine) / statistics.median(theirs)
        results.append({
            "what": row.what, "rival": row.rival_name, "rounds": rounds,
            "ours_seconds": statistics.median(mine), "ours_spread": spread(mine),
            "rival_seconds": statistics.median(theirs), "rival_spread": spread(theirs),
            "ratio": ratio, "reach": row.reach, "aim": row.aim, "verdict": row.verdict(ratio, statistics.median(mine) - statistics.median(theirs)),
        })
    return results


def human(seconds: float) -> str:
    if seconds < 0:
        return "-" + human(-seconds)
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def show(title: str, results: list[dict]):
    layout = "{:<24} {:>10} {:>6}   {:<20} {:>10} {:>6}   {:>8} {:>8} {:>8}  {}"
    print(f"\n{title}")
    print(layout.format("ours", "median", "+-", "rival", "median", "+-", "ratio", "reach", "aim", ""))
    goal = lambda value: "" if value is None else f"{value:.4g}"
    for row in results:
        print(layout.format(row["what"], human(row["ours_seconds"]), f"{row['ours_spread']:.0%}", row["rival"],
                            human(row["rival_seconds"]), f"{row['rival_spread']:.0%}", f"{row['ratio']:.4g}",
                            goal(row["reach"]), goal(row["aim"]), row["verdict"]).rstrip(), flush=True)

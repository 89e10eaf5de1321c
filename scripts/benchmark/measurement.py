"""Measures pairs, interleaved, and shows them."""

import statistics
import time


def measure(calls: int, function) -> float:
    """Seconds for one call; what has to be made ready before and cleared away after is not counted. A function may say
    itself how long it took."""
    getattr(function, "prepare", lambda: None)()
    started = time.perf_counter()
    for _ in range(calls):
        said = function()
    seconds = said if isinstance(said, float) else (time.perf_counter() - started) / calls
    getattr(function, "finish", lambda: None)()
    return seconds


def spread(times: list[float]) -> float:
    """Half of the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def run(table: list[tuple], rounds: int) -> list[dict]:
    times = [([], []) for _ in table]
    for _, _, ours, _, rival in table:
        measure(1, ours)
        measure(1, rival)
    for number in range(rounds):
        for (_, calls, ours, _, rival), (mine, theirs) in zip(table, times):
            # Who goes first changes, since the first one warms the caches.
            pairs = [(ours, mine), (rival, theirs)]
            for function, into in pairs if number % 2 == 0 else reversed(pairs):
                into.append(measure(calls, function))
    return [{
        "what": what, "rival": name,
        "ours_seconds": statistics.median(mine), "ours_spread": spread(mine),
        "rival_seconds": statistics.median(theirs), "rival_spread": spread(theirs),
        "ratio": statistics.median(mine) / statistics.median(theirs),
    } for (what, _, _, name, _), (mine, theirs) in zip(table, times)]


def human(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def show(results: list[dict]):
    layout = "{:<24} {:>10} {:>6}   {:<20} {:>10} {:>6}   {:>7}"
    print(layout.format("ours", "median", "+-", "rival", "median", "+-", "ratio"))
    for row in results:
        print(layout.format(row["what"], human(row["ours_seconds"]), f"{row['ours_spread']:.0%}", row["rival"],
                            human(row["rival_seconds"]), f"{row['rival_spread']:.0%}", f"{row['ratio']:.3f}"))

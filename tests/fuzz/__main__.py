"""``python -m tests.fuzz``: many cases, or one again. See docs/fuzzing.md."""

from __future__ import annotations

import argparse
import collections
import sys

from tqdm import tqdm

from tests.fuzz.case import Case, drawn
from tests.fuzz.ranks import EQUAL, REFUSED, UNDRAWABLE
from tests.fuzz.worlds import Verdict, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=500, help="how many seeds, from --first on")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, action="append", help="this seed alone; may be given several times")
    parser.add_argument("--case", help="a case as --show prints it")
    parser.add_argument("--show", action="store_true", help="print the cases, run none")
    parser.add_argument("--shrink", action="store_true", help="look for a smaller case that fails too")
    parser.add_argument("--log", action="store_true", help="print the ranks' tracebacks of each finding")
    asked = parser.parse_args()
    seeds = asked.seed or range(asked.first, asked.first + asked.cases)
    cases = [Case.from_json(asked.case)] if asked.case else [drawn(seed) for seed in seeds]
    if asked.show:
        print("\n".join(case.to_json() for case in cases))
        return 0
    verdicts = with_bar(cases, asked.log)
    print(summary(verdicts))
    findings = [verdict for verdict in verdicts if verdict.finding]
    if asked.shrink:
        from tests.fuzz.shrink import shrunk

        for verdict in findings:
            print(f"smallest like seed {verdict.case.seed}:\n  {shrunk(verdict).to_json()}")
    return 1 if findings else 0


def with_bar(cases: list[Case], log: bool = False) -> list[Verdict]:
    """Run ``cases``, a progress bar on stderr and a line for each finding as it comes."""
    counts: collections.Counter[str] = collections.Counter()
    with tqdm(total=len(cases), unit="case", dynamic_ncols=True, mininterval=1.0) as bar:

        def tell(verdict: Verdict) -> None:
            counts[verdict.kind] += 1
            bar.set_postfix_str(", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())), refresh=False)
            bar.update()
            if verdict.finding:
                bar.write(line(verdict), file=sys.stdout)
                if log:
                    bar.write(verdict.log, file=sys.stdout)

        return run(cases, tell)


def line(verdict: Verdict) -> str:
    case = verdict.case
    return f"{verdict.kind}: make fuzz SEED={case.seed}  # {case}\n    {verdict.said}"


def summary(verdicts: list[Verdict]) -> str:
    """How many ended how, every sentence that refused, and the largest errors of those that are equal."""
    counts = collections.Counter(verdict.kind for verdict in verdicts)
    seconds = sum(verdict.seconds for verdict in verdicts)
    lines = [
        f"{len(verdicts)} cases in {seconds:.0f} s: " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    ]
    worst: dict[str, tuple[float, int]] = {}
    for verdict in verdicts:
        if verdict.kind == EQUAL:
            for kind, error in verdict.errors.items():
                worst[kind] = max(worst.get(kind, (0.0, 0)), (error, verdict.case.seed))
    lines.append("largest of the equal: " + ", ".join(f"{k} {e:.1e} (seed {s})" for k, (e, s) in worst.items()))
    for kind in (REFUSED, UNDRAWABLE):
        said: dict[str, list[int]] = {}
        for verdict in verdicts:
            if verdict.kind == kind:
                said.setdefault(verdict.said[:400], []).append(verdict.case.seed)
        lines += [
            f"{kind} {len(seeds)}x (seeds {', '.join(map(str, seeds[:6]))}): {text}" for text, seeds in said.items()
        ]
    lines += [line(verdict) for verdict in verdicts if verdict.finding]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

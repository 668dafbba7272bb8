"""Simulates sweeps that answer a question: how often a verdict is wrong, and what seeds it takes to tell a difference.

    python benchmarks/sweep_verdicts.py [--sweeps 1000] [--powers 1000] [--json FILE]

No model is trained: a run's metric is the value of its configuration, plus what its seed does to all runs (standard
deviation 1), plus what it does to this run alone (0.3), so that the paired difference of two runs has the standard
deviation 0.42. Verdicts are those of `qlora.sweep.verdicts`, round by round as a sweep adds seeds. A wrong verdict is
better or worse where there is no difference. Beside it stands the paired t-test with Bonferroni's correction at a fixed
number of seeds, and the same test looked at after every seed, which is what must not be done.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora.sweep.jobs import Job, Status
from qlora.sweep.verdicts import ERROR, Question, Verdict, judge

SHARED, OWN = 1.0, 0.3
SPREAD = OWN * math.sqrt(2)
"""The standard deviation of a paired difference."""
MARGIN = SPREAD
SEEDS = 20
FIXED = (5, 10, 20)
"""The numbers of seeds of the fixed tests."""


def normal(draw: random.Random) -> float:
    """Returns normal noise."""
    return draw.gauss(0, 1)


def heavy(draw: random.Random) -> float:
    """Returns Student's t with 3 degrees of freedom: now and then a run goes astray."""
    return draw.gauss(0, 1) / math.sqrt(sum(draw.gauss(0, 1) ** 2 for _ in range(3)) / 3) / math.sqrt(3)


def skewed(draw: random.Random) -> float:
    """Returns centred exponential noise."""
    return draw.expovariate(1) - 1


NOISES: dict[str, Callable[[random.Random], float]] = {"normal": normal, "heavy tails": heavy, "skewed": skewed}


def build_question(candidates: int, seeds: int = SEEDS) -> Question:
    """Returns the question of a simulated sweep."""
    values = ["base", *(f"c{index}" for index in range(candidates))]
    names = {value: [f"{value}-{seed}" for seed in range(seeds)] for value in values}
    return Question("value", "base", "eval_loss", False, MARGIN, list(range(seeds)), names)


def simulate(
    question: Question, differences: list[float], noise: Callable[[random.Random], float], draw: random.Random
) -> dict[str, Job]:
    """Returns the finished jobs of a sweep whose candidates differ from the baseline by `differences`."""
    shared = [SHARED * draw.gauss(0, 1) for _ in question.seeds]
    jobs = {}
    for (_, names), difference in zip(question.jobs.items(), [0.0, *differences], strict=True):
        for name, of_seed in zip(names, shared, strict=True):
            metric = 1 + difference + of_seed + OWN * noise(draw)
            jobs[name] = Job(Path(name), status=Status.finished, metrics={question.metric: metric})
    return jobs


def paired(question: Question, jobs: dict[str, Job], value: str) -> list[float]:
    """Returns the differences of a candidate in the order of the seeds."""
    pairs = zip(question.jobs[value], question.jobs[question.baseline], strict=True)
    return [jobs[name].metrics[question.metric] - jobs[base].metrics[question.metric] for name, base in pairs]


def t_test(values: list[float], alpha: float) -> bool:
    """Returns whether the two-sided t-test finds a difference."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return abs(mean) * math.sqrt(len(values)) > t_quantile(len(values) - 1, alpha) * deviation


_QUANTILES: dict[tuple[int, float], float] = {}


def t_quantile(freedom: int, alpha: float) -> float:
    """Returns what |t| exceeds with the probability `alpha`: bisection on the distribution's closed series."""

    def tail(t: float) -> float:  # Abramowitz and Stegun 26.7.3 and 26.7.4
        theta = math.atan(t / math.sqrt(freedom))
        term = math.cos(theta) if freedom % 2 else 1.0
        total, index = (term if freedom > 1 else 0.0), 2 if freedom % 2 else 1
        while index < freedom - 1:
            term *= math.cos(theta) ** 2 * index / (index + 1)
            total += term
            index += 2
        inside = 2 / math.pi * (theta + math.sin(theta) * total) if freedom % 2 else math.sin(theta) * total
        return 1 - inside

    if (freedom, alpha) not in _QUANTILES:
        _QUANTILES[freedom, alpha] = bisect(lambda t: tail(t) > alpha, 0.0, 1e4)
    return _QUANTILES[freedom, alpha]


def bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Returns where `is_below` turns false."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return low


def exact_interval(count: int, total: int, error: float = 0.05) -> tuple[float, float]:
    """Returns the exact (Clopper-Pearson) interval of a share."""

    def at_most(k: int, fraction: float) -> float:
        if fraction in (0.0, 1.0):
            return 1.0 if fraction == 0.0 or k >= total else 0.0
        odds = math.log(fraction), math.log1p(-fraction)
        ways = [math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(k + 1)]
        logs = (way + i * odds[0] + (total - i) * odds[1] for i, way in enumerate(ways))
        return math.fsum(map(math.exp, logs))

    low = 0.0 if count == 0 else bisect(lambda fraction: 1 - at_most(count - 1, fraction) < error / 2, 0.0, 1.0)
    high = 1.0 if count == total else bisect(lambda fraction: at_most(count, fraction) > error / 2, 0.0, 1.0)
    return low, high


def measure_errors(candidates: int, noise: str, sweeps: int) -> dict[str, Any]:
    """Returns the shares of sweeps without a difference that end in a wrong verdict."""
    question, draw = build_question(candidates), random.Random(f"{candidates} {noise}")
    wrong = {"sequential": 0, "fixed": 0, "peeking": 0}
    for _ in range(sweeps):
        jobs = simulate(question, [0.0] * candidates, NOISES[noise], draw)
        verdicts = [item.verdict for item in judge(question, jobs)]
        wrong["sequential"] += any(verdict in (Verdict.better, Verdict.worse) for verdict in verdicts)
        values = [paired(question, jobs, value) for value in question.candidates]
        wrong["fixed"] += any(t_test(differences, question.alpha) for differences in values)
        looks = range(question.fewest_seeds, SEEDS + 1)
        wrong["peeking"] += any(t_test(differences[:n], question.alpha) for differences in values for n in looks)
    low, high = exact_interval(wrong["sequential"], sweeps)
    shares = {name: count / sweeps for name, count in wrong.items()}
    return {"candidates": candidates, "noise": noise, "sweeps": sweeps, **shares, "low": low, "high": high}


def measure_power(effect: float, sweeps: int, candidates: int = 2) -> dict[str, Any]:
    """Returns how often a difference of `effect` standard deviations is told, and by how many seeds; of one candidate.

    The others do not differ from the baseline.
    """
    question, draw = build_question(candidates), random.Random(f"power {effect}")
    counts, seeds = dict.fromkeys(Verdict, 0), 0
    fixed = dict.fromkeys(FIXED, 0)
    for _ in range(sweeps):
        jobs = simulate(question, [effect * SPREAD, *[0.0] * (candidates - 1)], normal, draw)
        item = judge(question, jobs)[0]
        counts[item.verdict] += 1
        seeds += item.count
        for n in FIXED:
            fixed[n] += t_test(paired(question, jobs, "c0")[:n], question.alpha)
    return {
        "effect": effect,
        "sweeps": sweeps,
        "seeds": seeds / sweeps,
        **{verdict.value: count / sweeps for verdict, count in counts.items()},
        **{f"fixed_{n}": count / sweeps for n, count in fixed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=1000, help="simulated sweeps without a difference, of each kind")
    parser.add_argument("--powers", type=int, default=1000, help="simulated sweeps with each difference")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args()
    errors = [measure_errors(count, noise, args.sweeps) for count in (1, 2, 5) for noise in NOISES]
    powers = [measure_power(effect, args.powers) for effect in (0, 0.25, 0.5, 1, 1.5, 2, 3, 5)]
    print(
        f"\nWrong verdicts in {args.sweeps:,} sweeps without a difference, up to {SEEDS} seeds, {ERROR:.0%} allowed:\n"
    )
    print(
        f"| candidates | noise | wrong | exact 95 % interval | fixed t-test, {SEEDS} seeds | t-test after every seed |"
    )
    print("|---|---|---:|---|---:|---:|")
    for row in errors:
        interval = f"{row['low']:.2%} to {row['high']:.2%}"
        print(f"| {row['candidates']} | {row['noise']} | {row['sequential']:.1%} | {interval} | {row['fixed']:.1%} | "
              f"{row['peeking']:.1%} |")  # fmt: skip
    print(f"\nTwo candidates, of which one differs, in {args.powers:,} sweeps; in standard deviations of the paired "
          f"difference, the margin is {MARGIN / SPREAD:g}:\n")  # fmt: skip
    heads = " | ".join(f"t-test, {n} seeds" for n in FIXED)
    print(f"| difference | worse | same | open | seeds | {heads} |")
    print(f"|---:|---:|---:|---:|---:|{'---:|' * len(FIXED)}")
    for row in powers:
        told = row["worse"] + row["better"]
        fixed = " | ".join(f"{row[f'fixed_{n}']:.0%}" for n in FIXED)
        print(
            f"| {row['effect']:g} | {told:.0%} | {row['same']:.0%} | {row['open']:.0%} | {row['seeds']:.1f} | {fixed} |"
        )
    if args.json:
        args.json.write_text(json.dumps({"errors": errors, "powers": powers}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Statistics over runs by rliable and scipy: interquartile means, bootstrap intervals, rates of counts.

[RL] Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021.
A statistic takes scores (R, M, ...) of R runs (seeds) on M maps, and returns an array of at least 1-d. Where
maps have unlike numbers of runs, scores are a list of M arrays.
"""

import math

import numpy as np
from scipy import stats

REPS = 2000  # bootstrap samples, as [RL] for profiles
NOTE = """IQM: interquartile mean over seeds, with a 95% interval from 2000 bootstrap samples that are
stratified by map ([rliable](https://github.com/google-research/rliable)). Three seeds have no quarter to
cut, so theirs is the mean; resampling so few cannot show what a fourth seed would do, and their intervals
are too narrow."""


def iqm(scores):
    """Interquartile mean over runs and maps: (R, M, ...) -> (...). rliable's, for many numbers at once."""
    ordered = np.sort(scores.reshape(-1, *scores.shape[2:]), axis=0)  # (R M, ...)
    cut = len(ordered) // 4
    return np.atleast_1d(ordered[cut : len(ordered) - cut].mean(0))


def improvement(x, y):
    """P(a run of x is better than one of y), ties half, mean over maps: (R, M) and (Q, M) -> (1,).

    rliable's probability_of_improvement without the test behind it, which takes a hundred times longer.
    """
    wins, ties = (x[:, None] > y).mean((0, 1)), (x[:, None] == y).mean((0, 1))  # (M,)
    return (wins + ties / 2).mean(keepdims=True)


def even(columns):
    """(R, M) of M arrays of unlike lengths: each is repeated until all are as long; maps count alike."""
    runs = math.lcm(*map(len, columns))
    return np.stack([np.tile(column, runs // len(column)) for column in columns], axis=1)


def estimate(statistic, *scores):
    """A statistic of scores and its 95% interval: (...) and (2, ...), from runs resampled within each map."""
    if isinstance(scores[0], list):  # rliable has no maps of unlike numbers of runs
        draw = np.random.default_rng(0).choice
        draws = [statistic(*(even([draw(x, len(x)) for x in maps]) for maps in scores)) for _ in range(REPS)]
        return statistic(*map(even, scores)), np.percentile(draws, [2.5, 97.5], axis=0)
    from rliable import library  # takes seconds, and who only counts does without it

    np.random.seed(0)  # rliable draws from numpy's global generator
    data = scores[0] if len(scores) == 1 else list(scores)
    value, limits = library.get_interval_estimates({0: data}, statistic, reps=REPS)
    return value[0], limits[0]


def profile(scores, levels):
    """{label: scores (R, M)} -> ({label: share of runs above each level}, {label: (2, levels)})."""
    from rliable import library

    np.random.seed(0)
    return library.create_performance_profile(scores, levels, reps=REPS, custom_profile_func=above)


def above(scores, levels):
    """Share of the scores (R, M) above each level: (levels,)."""
    return (scores[..., None] > levels).mean((0, 1))


def between(statistic, *scores, digits=2):
    """'0.83 [0.70, 0.91]': a statistic of one number; no interval of a single run, '-' of none."""
    runs = [len(x) for maps in scores for x in (maps if isinstance(maps, list) else [maps])]
    if not all(runs):
        return "-"
    value, limits = estimate(statistic, *scores)
    if max(runs) == 1:
        return f"{value[0]:.{digits}f}"
    return f"{value[0]:.{digits}f} [{limits[0, 0]:.{digits}f}, {limits[1, 0]:.{digits}f}]"


def iqm_of(values, digits=2):
    """'0.83 [0.70, 0.91]': IQM of one number per seed."""
    return between(iqm, np.array(values, dtype=float)[:, None], digits=digits)


def wilson(successes, n):
    """Wilson's 95% interval of a rate, (low, high)."""
    interval = stats.binomtest(successes, n).proportion_ci(method="wilson")
    return interval.low, interval.high


def success_rate(outcomes):
    """How many of a list of bools are True, with Wilson's 95% interval: "7 of 20 (18 to 57%)"."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return f"{sum(outcomes)} of {len(outcomes)} ({100 * low:.0f} to {100 * high:.0f}%)"

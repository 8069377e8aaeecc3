"""How far a figure measured on a few hundred samples can be trusted: 95 % intervals, by scipy."""

from __future__ import annotations

import numpy as np


def share_interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's interval for a proportion. It is also valid at 0 % and 100 %."""
    from scipy.stats import binomtest

    interval = binomtest(right, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def loss_interval(losses: list[float], counts: list[int], seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval (2,000 resamples) for the loss per token, sum(losses) / sum(counts)."""
    rows = np.random.default_rng(seed).integers(len(losses), size=(2000, len(losses)))
    drawn = np.asarray(losses)[rows].sum(1) / np.asarray(counts)[rows].sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(ours: list[bool], theirs: list[bool]) -> tuple[float, float, float]:
    """(share of ours) - (share of theirs) on the same samples in the same order, and its interval by the paired t-test.

    Samples that both get right, or both wrong, carry no noise into the difference: it is known better than either
    share.
    """
    from scipy.stats import ttest_rel

    mean = float(np.mean(ours) - np.mean(theirs))
    if list(ours) == list(theirs):  # no spread to go by
        return 0.0, 0.0, 0.0
    interval = ttest_rel(np.asarray(ours, float), np.asarray(theirs, float)).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)

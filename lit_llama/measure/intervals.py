"""95 % intervals of results on one set of test samples, from one training run or from several that differ in the seed.

A result is an array y (S seeds, n samples). Other seeds would change its mean, and so would other samples; both count:

    Var(mean) = var(means of seeds) / S + var(means of samples) / n        with one seed, only the second term

This is a two-way layout with random rows and columns (Scheffe 1959, The Analysis of Variance, section 7.4). The exact
formula subtracts what both terms count twice; without that, simulated intervals from three seeds cover 93 to 97 % if
the seeds differ by up to three points, and 91 % at eight (tests/test_compare.py). One seed's interval covers samples
alone. Degrees of freedom are Satterthwaite's (1946).
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Array = NDArray[np.float64]


def variance_of_mean(y: Array) -> tuple[float, float]:
    """The variance of y's mean from the choice of seeds, and from the choice of samples."""
    S, n = y.shape
    of_seeds = y.mean(1).var(ddof=1) / S if S > 1 else 0.0
    return of_seeds, y.mean(0).var(ddof=1) / n if n > 1 else math.inf


def mean_interval(y: Array) -> tuple[float, float]:
    """Student's interval of the mean."""
    (S, n), (seeds, samples) = y.shape, variance_of_mean(y)
    if n == 1:
        return -math.inf, math.inf
    squares = seeds**2 / max(1, S - 1) + samples**2 / (n - 1)
    half = t.ppf(0.975, (seeds + samples) ** 2 / squares) * math.sqrt(seeds + samples) if squares else 0.0
    return y.mean() - half, y.mean() + half


def proportion_interval(y: Array) -> tuple[float, float]:
    """Wilson's interval of a proportion, for y of 0 and 1. It is valid at 0 % and 100 % too.

    With several seeds, the number of samples is the one that would give a single run the same variance.
    """
    p, n, (seeds, samples) = y.mean(), y.shape[1], variance_of_mean(y)
    z, effective_n = 1.96, float(n)
    if 0 < seeds + samples < math.inf:
        effective_n = p * (1 - p) / (seeds + samples) * n / (n - 1)
        z = t.ppf(0.975, (1 + samples / seeds) ** 2 * (len(y) - 1)) if seeds else z
    half = z * math.sqrt(p * (1 - p) / effective_n + z**2 / (4 * effective_n**2))
    low, high = ((p + z**2 / (2 * effective_n) + side) / (1 + z**2 / effective_n) for side in (-half, half))
    return max(0.0, low), min(1.0, high)


def difference_interval(ours: Array, theirs: Array) -> tuple[float, float]:
    """Newcombe's interval (1998, method 10) of the difference between two proportions on the same samples.

    It combines their Wilson intervals and the correlation of the answers to a sample. It stays within -1 and 1, and has
    a width even if both are always right.
    """
    p, q = ours.mean(), theirs.mean()
    variances = sum(variance_of_mean(ours)) * sum(variance_of_mean(theirs))
    n = ours.shape[1]
    covariance = ((ours.mean(0) - p) * (theirs.mean(0) - q)).mean()
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))  # Newcombe's correction for few samples
    r = covariance / max(1, n - 1) / math.sqrt(variances) if 0 < variances < math.inf else 0.0
    (p_low, p_high), (q_low, q_high) = proportion_interval(ours), proportion_interval(theirs)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * r * a * b + b**2))

    return p - q - distance(p - p_low, q_high - q), p - q + distance(p_high - p, q - q_low)


def per_token(losses: Array, counts: Array) -> tuple[float, tuple[float, float]]:
    """The loss per token, sum(losses) / sum(counts), and its interval; losses (S, n), counts (n,).

    The interval is that of the mean of each sample's contribution (the delta method for a ratio).
    """
    loss = float(losses.mean(0).sum() / counts.sum())
    return loss, mean_interval(loss + (losses - loss * counts) / counts.mean())

"""The feature-based approach: the frozen model's vectors are the input of a small classifier.

Paper: "Deep contextualized word representations", Peters et al. 2018, https://arxiv.org/abs/1802.05365

        ids (T,) -> wte -> h[0] .. h[N-1] -> ln_f -> the last token's vector (C,) -> logistic regression -> label

Each text's vector is computed once, and no gradient. scikit-learn fits the classifier, which is saved as plain arrays,
not as a pickle; ``probabilities`` computes its answers from them.

Trains (C + 1) * labels parameters, or C + 1 for two labels: 4,097 for LLaMA-7B.
"""

import numpy as np

from lit_llama.common.errors import UserError


def fit_logistic(vectors: np.ndarray, labels: list[str], C: float = 1.0) -> tuple[dict[str, np.ndarray], list[str]]:
    """Fit a logistic regression; return its weight and bias, and its labels in their order.

    A smaller ``C`` is a stronger L2 penalty on the weight of the standardized vectors.
    """
    from sklearn.linear_model import LogisticRegression  # importing it takes a second; generation does not need it

    if len(set(labels)) < 2:
        raise UserError(f"a classifier needs two labels or more, got {set(labels)}")
    mean, std = vectors.mean(0), vectors.std(0) + 1e-6
    logistic = LogisticRegression(C=C, max_iter=5000).fit((vectors - mean) / std, labels)
    weight = logistic.coef_ / std  # fold the standardization into weight and bias
    return {"weight": weight, "bias": logistic.intercept_ - weight @ mean}, list(logistic.classes_)


def probabilities(arrays: dict[str, np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """vectors (n, C) -> the probability of each label, (n, labels)."""
    scores = vectors @ arrays["weight"].T + arrays["bias"]
    scores = np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores
    scores = np.exp(scores - scores.max(1, keepdims=True))
    return scores / scores.sum(1, keepdims=True)

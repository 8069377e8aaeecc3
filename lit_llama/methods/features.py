"""The feature-based approach: the frozen model's vectors are the input of a small classifier.

Paper: "Deep contextualized word representations", Peters et al. 2018, https://arxiv.org/abs/1802.05365

        ids (T,) -> wte -> h[0] .. h[N-1] -> ln_f -> the last token's vector (C,) -> logistic regression -> label

Each text's vector is computed once, and no gradient. scikit-learn fits the classifier, which is saved as plain arrays,
not as a pickle; ``probabilities`` computes its answers from them.

Trains (C + 1) * labels parameters, or C + 1 for two labels: 4,097 for LLaMA-7B.
"""

import numpy as np

from lit_llama.common.errors import UserError

CLASSIFIERS = ("logistic", "forest")


def fit_classifier(
    classifier: str, vectors: np.ndarray, labels: list[str], seed: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Fit a "logistic" regression or a random "forest"; return its arrays, and its labels in their order."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    if classifier not in CLASSIFIERS or len(set(labels)) < 2:
        raise UserError(f"needs one of {CLASSIFIERS} and two labels or more: got {classifier!r} and {set(labels)}")
    if classifier == "forest":
        forest = RandomForestClassifier(n_estimators=200, random_state=seed, n_jobs=-1).fit(vectors, labels)
        return forest_arrays(forest), list(forest.classes_)
    mean, std = vectors.mean(0), vectors.std(0) + 1e-6
    logistic = LogisticRegression(max_iter=5000, random_state=seed).fit((vectors - mean) / std, labels)
    weight = logistic.coef_ / std  # fold the standardization into weight and bias
    return {"weight": weight, "bias": logistic.intercept_ - weight @ mean}, list(logistic.classes_)


def forest_arrays(forest) -> dict[str, np.ndarray]:
    """All trees' nodes as arrays: children (-1 at a leaf), feature, threshold, label probabilities; and the roots."""
    trees = [estimator.tree_ for estimator in forest.estimators_]
    roots = np.cumsum([0] + [tree.node_count for tree in trees])[:-1]
    left, right = (
        np.concatenate([np.where(child >= 0, child + root, -1) for child, root in zip(children, roots, strict=True)])
        for children in ([tree.children_left for tree in trees], [tree.children_right for tree in trees])
    )
    shares = np.concatenate([tree.value[:, 0] / tree.value[:, 0].sum(1, keepdims=True) for tree in trees])
    feature = np.concatenate([tree.feature for tree in trees])
    threshold = np.concatenate([tree.threshold for tree in trees])
    return dict(left=left, right=right, feature=feature, threshold=threshold, shares=shares, roots=roots)


def probabilities(arrays: dict[str, np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """vectors (n, C) -> the probability of each label, (n, labels)."""
    if "weight" in arrays:
        scores = vectors @ arrays["weight"].T + arrays["bias"]
        scores = np.hstack([np.zeros_like(scores), scores]) if scores.shape[1] == 1 else scores
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)
    nodes = np.repeat(arrays["roots"][None], len(vectors), axis=0)  # (n, trees): all walks advance together
    while (inner := arrays["left"][nodes] >= 0).any():
        values = np.take_along_axis(vectors, arrays["feature"][nodes].clip(0), 1)  # leaves hold -2 there
        below = np.where(values <= arrays["threshold"][nodes], arrays["left"][nodes], arrays["right"][nodes])
        nodes = np.where(inner, below, nodes)
    return arrays["shares"][nodes].mean(1)

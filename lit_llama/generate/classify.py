"""Trained folders that answer with a label: features, and methods whose head is a classifier."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError
from lit_llama.common.files import read_tensors
from lit_llama.generate.decode import label_probabilities, text_vectors
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.features import probabilities
from lit_llama.trained import METHOD_FILE, TRAINED_FILE, check_base, read_method

# prompts as ids -> the probability of each label, (n, labels)
Classifier = Callable[[list[list[int]]], np.ndarray]


def is_classifier(method: dict) -> bool:
    """Whether a trained folder with this method.json answers with a label."""
    return method["arguments"].get("labels") is not None


def load_classifier(
    trained_dir: Path | str,
    checkpoint_dir: Path | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Classifier, dict]:
    """The classifier of a trained folder, and its method.json, whose arguments hold the labels.

    Raises UserError if the folder answers with text.
    """
    method, path = read_method(trained_dir), Path(trained_dir) / METHOD_FILE
    if not is_classifier(method):
        raise UserError(f"{path} describes {method['method']}, which answers with text: see generate/adapter.py")
    if method["method"] != "features":
        model, _ = load_trained_folder(trained_dir, checkpoint_dir, dtype, device, quantize=None)
        return partial(label_probabilities, model), method
    model = load_model(check_base(method["base"], checkpoint_dir, path), dtype, device)
    tensors, _ = read_tensors(Path(trained_dir) / TRAINED_FILE)
    if "weight" not in tensors:
        raise UserError(f"{trained_dir} holds a random forest of an earlier version; train again")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return lambda prompts: probabilities(arrays, text_vectors(model, prompts)), method

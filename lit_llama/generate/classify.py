"""Trained folders that answer with a label: features, and methods whose head is a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lit_llama.checkpoint import load_model
from lit_llama.cli import UserError
from lit_llama.common.files import read_tensors
from lit_llama.generate.load import load_trained_folder
from lit_llama.methods.features import probabilities, text_vectors
from lit_llama.model import LLaMA
from lit_llama.trained import METHOD_FILE, TRAINED_FILE, check_base, read_method

# prompts as ids -> the probability of each label, (n, labels)
Classifier = Callable[[list[list[int]]], np.ndarray]


def is_classifier(method: dict) -> bool:
    """Whether a method.json is that of a folder that answers with a label."""
    return method["arguments"].get("labels") is not None


def load_classifier(
    trained_dir: Path, checkpoint_dir: Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Classifier, dict]:
    """What tells the probability of each label, and the folder's method.json with the labels in its arguments."""
    method, path = read_method(trained_dir), Path(trained_dir) / METHOD_FILE
    if not is_classifier(method):
        name = method["method"]
        raise UserError(f"{path} is of {name} with a language head: it answers with text, see generate/adapter.py")
    if method["method"] == "features":
        model = load_model(check_base(method["base"], checkpoint_dir, path), dtype, device)
        tensors, _ = read_tensors(Path(trained_dir) / TRAINED_FILE)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return lambda prompts: probabilities(arrays, text_vectors(model, prompts)), method
    model, _ = load_trained_folder(trained_dir, checkpoint_dir, dtype, device, quantize=None)
    return lambda prompts: label_shares(model, prompts), method


@torch.inference_mode()
def label_shares(model: LLaMA, prompts: list[list[int]]) -> np.ndarray:
    """The probability of each label, (n, labels), by a model whose head is a classifier."""
    training = model.training
    vectors = torch.from_numpy(text_vectors(model.eval(), prompts)).to(model.lm_head.weight.device)
    model.train(training)
    return model.lm_head(vectors).softmax(-1).cpu().numpy()

"""EleutherAI's lm_eval, as docs/formats.md calls it, on what we export."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import logits_of, make_base, save_trained

from lit_llama.formats.export import export_hf
from lit_llama.formats.peft import export_peft
from lit_llama.generate.load import load_trained_folder
from lit_llama.tokenizer import Tokenizer

FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
CHOICES = ["four", "blue as the sea", "d"]


@pytest.mark.slow  # lm_eval reads the files of its thousands of tasks first
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("lora", dict(r=2, alpha=4, dropout=0.0, targets=["q", "fc1"])), ("soft_prompt", dict(prompt_length=3))],
)
def test_the_command_gives_our_log_probabilities(tmp_path, monkeypatch, method, arguments):
    lm_eval = pytest.importorskip("lm_eval.__main__")
    base = make_base(tmp_path / "base")
    trained = save_trained(base, tmp_path / "trained", method, **arguments)
    export_hf(base, tmp_path / "hf")
    export_peft(trained, tmp_path / "peft")
    rows = [{"question": question, "choices": CHOICES} for question in ("Two and two?", "The sky is", "A b c")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))

    (command,) = re.findall(r"lm_eval --model hf[^`]*", FORMATS.read_text(encoding="utf-8"))
    places = {"exported/base": tmp_path / "hf", "out/peft/bookings": tmp_path / "peft"}
    for place, ours in {**places, "arc_easy": f"tiny --include_path {tmp_path} --device cpu"}.items():
        command = command.replace(place, str(ours))
    command += f" --output_path {tmp_path / 'results'} --log_samples"
    monkeypatch.setattr(sys, "argv", shlex.split(command.replace("pretrained=", "dtype=float32,pretrained=")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval.cli_evaluate()

    (written,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    samples = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(samples) == len(rows)
    model, tokenizer = load_trained_folder(trained)[0].eval(), Tokenizer(base)
    for sample in samples:
        prompt = tokenizer.encode(sample["doc"]["question"])
        for choice, answer in zip(CHOICES, sample["filtered_resps"], strict=True):
            ids = tokenizer.encode(f" {choice}")  # the space is its own
            with torch.no_grad():
                logits = logits_of(model, torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert float(answer[0]) == pytest.approx(logits[range(len(ids)), ids].sum().item(), abs=1e-3)

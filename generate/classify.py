"""Label a text with what finetune/features.py learned, or a method with --head classifier.

python generate/classify.py --prompt "Could we start at half past seven instead?"
python generate/classify.py --trained_dir out/full/intents --prompt "..."
"""

import sys

from lit_llama import cli
from lit_llama.common.errors import UserError
from lit_llama.data.prompts import encode_prompt, trained_template
from lit_llama.devices.launch import base_dtype, default_device
from lit_llama.generate.load import load_classifier
from lit_llama.tokenizer import Tokenizer


def main(
    prompt: str,
    input: str = "",
    trained_dir: str = "out/features/intents",
    checkpoint_dir: str | None = None,
    precision: str = "auto",
) -> None:
    """Print each label of a text with its probability, most likely first.

    Args:
        prompt: The text, or the instruction.
        checkpoint_dir: Folder of the base, if it has moved since training.
    """
    device = default_device()
    classify, method = load_classifier(trained_dir, checkpoint_dir, base_dtype(precision, device), device)
    print(f"{method['method']} over {method['base']['name']}", file=sys.stderr)
    tokenizer = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"])
    messages = [{"role": "user", "content": prompt, "input": input}]
    ids = encode_prompt(messages, trained_template(method, tokenizer), tokenizer)
    if not ids:
        raise UserError("the text is empty, there is nothing to classify")
    (probabilities,) = classify([ids[-method["train"]["max_seq_length"] :]]).tolist()
    for probability, label in sorted(zip(probabilities, method["arguments"]["labels"], strict=True), reverse=True):
        print(f"{label} {100 * probability:.1f} %")


if __name__ == "__main__":
    cli.run(main)

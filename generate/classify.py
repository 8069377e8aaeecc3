"""Label a text with what finetune/features.py learned, or a method with --head classifier.

python generate/classify.py --prompt "Could we start at half past seven instead?"
python generate/classify.py --trained_dir out/full/intents --prompt "..."
"""

import sys

from lit_llama import cli


def main(
    prompt: str,
    input: str = "",
    trained_dir: str = "out/features/intents",
    checkpoint_dir: str | None = None,
    precision: str = "auto",
) -> None:
    """Print the likeliest label of a text and its probability, then those of the others.

    Args:
        prompt: The text, or the instruction.
        input: What the instruction is about, as in an Alpaca record.
        trained_dir: Folder that a finetune script wrote.
        checkpoint_dir: Folder of the base, where it is no longer where it was in training.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
    """
    from lit_llama.data.prompts import choose_style, encode_prompt
    from lit_llama.devices.launch import base_dtype, default_device
    from lit_llama.generate.classify import load_classifier
    from lit_llama.tokenizer import Tokenizer

    device = default_device()
    classify, method = load_classifier(trained_dir, checkpoint_dir, base_dtype(precision, device), device)
    print(f"{method['method']} over {method['base']['name']}", file=sys.stderr)
    tokenizer = Tokenizer(checkpoint_dir or method["base"]["checkpoint_dir"])
    messages = [{"role": "user", "content": prompt, "input": input}]
    style = choose_style(method["prompt_style"], tokenizer)
    ids = encode_prompt(messages, style, tokenizer)[-method["train"]["max_seq_length"] :]
    if not ids:
        raise cli.UserError("the text is empty, there is nothing to classify")
    labels, (shares,) = method["arguments"]["labels"], classify([ids])
    for share, label in sorted(zip(shares.tolist(), labels, strict=True), reverse=True):
        print(f"{label} {100 * share:.1f} %")


if __name__ == "__main__":
    cli.run(main)

"""Chat with a base, or with what a finetune script trained over it.

    python generate/chat.py
    python generate/chat.py --trained_dir out/lora/alpaca --system "You are a sommelier." --sampling.temperature 0.7

/help lists what can be said beside a message: /load swaps the trained folder over the same base. What was said before
is not computed again: its keys and values stay in the cache.
"""

import sys

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.common.errors import check_range
from lit_llama.settings import DEFAULT_BASE, MOST_TOKENS, Sampling


def main(
    trained_dir: str | None = None,
    checkpoint_dir: str | None = None,
    system: str = "",
    prompt_style: str | None = None,
    max_new_tokens: int = 512,
    sampling: Sampling = Sampling(),
    precision: str = "auto",
    compile: bool = False,
    yes: bool = False,
) -> None:
    """Chat on the terminal.

    Args:
        trained_dir: Folder that a finetune script wrote; without it the base alone answers.
        checkpoint_dir: Folder of the base; by default the one trained on, or the default base.
        system: Who the model is to be, said once before everything else.
        prompt_style: Of a base alone: alpaca, chatml, llama2, llama3 or plain; by default what it was trained in, or
            its tokenizer tells.
        max_new_tokens: The longest answer.
        sampling: How the next token is chosen.
        precision: Width of the base's weights: bf16-true, 32-true, or auto for the faster one.
        compile: Compile the blocks by torch.compile: half a minute first; in float32 on a CPU nothing is gained.
        yes: Do not ask before a download.
    """
    check_range("--max_new_tokens", max_new_tokens, 1, MOST_TOKENS)
    if not trained_dir:
        ensure_base(checkpoint_dir or DEFAULT_BASE, yes)

    from lit_llama.checkpoint import load_model
    from lit_llama.data.prompts import choose_style
    from lit_llama.devices.launch import base_dtype, default_device
    from lit_llama.generate.chat import Chat, converse, edit_lines
    from lit_llama.tokenizer import Tokenizer
    from lit_llama.trained import base_method, read_method

    if trained_dir and prompt_style:
        raise cli.UserError(f"{trained_dir} is asked as it was in training; leave out --prompt_style {prompt_style}")
    if checkpoint_dir is None:
        checkpoint_dir = read_method(trained_dir)["base"]["checkpoint_dir"] if trained_dir else DEFAULT_BASE
    device = default_device()
    base, tokenizer = load_model(checkpoint_dir, base_dtype(precision, device), device), Tokenizer(checkpoint_dir)
    style = choose_style(prompt_style or base_method(checkpoint_dir).get("prompt_style"), tokenizer)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    def notify(note: str) -> None:
        say(f"({note})\n")

    chat = Chat(checkpoint_dir, base, tokenizer, style, max_new_tokens, sampling, notify, compile)
    if trained_dir:
        say(chat.load(trained_dir) + "\n")
    if system:
        chat.set_system(system)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        say(f"{base.config.name}; /help for help\n")
        edit_lines()
    converse(chat, lambda: input("> " if on_terminal else ""), say)


if __name__ == "__main__":
    cli.run(main)

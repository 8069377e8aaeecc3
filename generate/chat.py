"""Chat with a base, or with what a finetune script trained over it.

    python generate/chat.py
    python generate/chat.py --trained_dir out/lora/alpaca --system "You are a sommelier." --sampling.temperature 0.7

/help lists the commands; /load swaps the trained folder over the same base. Earlier turns are not computed again: their
keys and values stay in the cache.
"""

from lit_llama import cli
from lit_llama.base import ensure_base
from lit_llama.checkpoint import load_model
from lit_llama.common.errors import UserError, check_range
from lit_llama.data.prompts import trained_template
from lit_llama.devices.launch import base_dtype, default_device
from lit_llama.generate.chat import Chat, converse
from lit_llama.settings import DEFAULT_BASE, MAX_TOKENS, Sampling
from lit_llama.tokenizer import Tokenizer
from lit_llama.trained import base_method, read_method


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
        trained_dir: Folder that a finetune script wrote. Default: none, the base answers.
        checkpoint_dir: Folder of the base. Default: the one trained on, or the default base.
        system: The system message, such as a role for the model.
        prompt_style: For a base: alpaca, plain or template. Default: as trained, or template if it has one.
    """
    check_range("--max_new_tokens", max_new_tokens, 1, MAX_TOKENS)
    if trained_dir and prompt_style:
        raise UserError(f"{trained_dir} keeps its prompt style from training; leave out --prompt_style {prompt_style}")
    if checkpoint_dir is None:
        checkpoint_dir = read_method(trained_dir)["base"]["checkpoint_dir"] if trained_dir else DEFAULT_BASE
    if not trained_dir:
        ensure_base(checkpoint_dir, yes)
    device = default_device()
    base, tokenizer = load_model(checkpoint_dir, base_dtype(precision, device), device), Tokenizer(checkpoint_dir)
    template = trained_template(base_method(checkpoint_dir), tokenizer, prompt_style)
    chat = Chat(checkpoint_dir, base, tokenizer, template, max_new_tokens, sampling, compile)
    chat.system = system
    if trained_dir:
        print(chat.load(trained_dir))
    converse(chat)


if __name__ == "__main__":
    cli.run(main)

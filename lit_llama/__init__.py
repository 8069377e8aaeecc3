"""Lit-LLaMA: a readable LLaMA and the finetuning methods around LLaMA-Adapter."""

__version__ = "0.1.0"
__all__ = ["LLaMA", "LLaMAConfig", "Tokenizer"]


def __getattr__(name: str) -> object:
    """Import a class when it is asked for: a script's --help need not wait for torch."""
    if name in ("LLaMA", "LLaMAConfig"):
        from lit_llama import model

        return getattr(model, name)
    if name == "Tokenizer":
        from lit_llama.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

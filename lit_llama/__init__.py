"""Lit-LLaMA: a readable LLaMA and the finetuning methods around LLaMA-Adapter."""

__version__ = "0.1.0"

"""Lit-LLaMA: a readable LLaMA and every finetuning method around LLaMA-Adapter."""

__version__ = "0.1.0"

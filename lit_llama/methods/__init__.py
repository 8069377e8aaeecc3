"""The finetuning methods: one file each, one function each that adds the method to a frozen model."""

from lit_llama.methods.adapter import add_adapter

METHODS = {"adapter": add_adapter}

"""The sizes of released models, by name: the fields of LLaMAConfig that are not LLaMA 1's 7B."""

from typing import Any

LLAMA_31_SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA_32_SCALING = dict(LLAMA_31_SCALING, factor=32.0)
LLAMA_2 = dict(block_size=4096, norm_eps=1e-5)
LLAMA_3 = dict(block_size=8192, vocab_size=128256, n_kv_head=8, norm_eps=1e-5, rope_base=500000.0)
LLAMA_31 = dict(LLAMA_3, block_size=131072, rope_scaling=LLAMA_31_SCALING)
LLAMA_32 = dict(LLAMA_3, block_size=131072, rope_scaling=LLAMA_32_SCALING, intermediate_size=8192, tie_embeddings=True)
SMOLLM2 = dict(block_size=8192, vocab_size=49152, head_size=64, norm_eps=1e-5, rope_base=100000.0, tie_embeddings=True)
WIDTH_13B = dict(n_layer=40, n_head=40, n_kv_head=40, n_embd=5120, intermediate_size=13824)
WIDTH_3B = dict(n_layer=26, n_embd=3200, head_size=100, intermediate_size=8640)

CONFIGS: dict[str, dict[str, Any]] = {
    "7B": dict(),
    "13B": WIDTH_13B,
    "30B": dict(n_layer=60, n_head=52, n_kv_head=52, n_embd=6656, intermediate_size=17920),
    "65B": dict(n_layer=80, n_head=64, n_kv_head=64, n_embd=8192, intermediate_size=22016, norm_eps=1e-5),
    "Llama-2-7b": LLAMA_2,
    "Llama-2-13b": dict(LLAMA_2, **WIDTH_13B),
    "Llama-2-70b": dict(LLAMA_2, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, intermediate_size=28672),
    "Llama-3-8B": dict(LLAMA_3, intermediate_size=14336),
    "Llama-3.1-8B": dict(LLAMA_31, intermediate_size=14336),
    "Llama-3.2-1B": dict(LLAMA_32, n_layer=16, n_embd=2048, head_size=64),
    "Llama-3.2-3B": dict(LLAMA_32, n_layer=28, n_head=24, n_embd=3072),
    "tiny-llama-1.1b": dict(n_layer=22, n_kv_head=4, n_embd=2048, head_size=64, intermediate_size=5632, norm_eps=1e-5),
    "open-llama-3b": WIDTH_3B,
    "open-llama-7b": dict(),
    "smollm2-135m": dict(SMOLLM2, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, intermediate_size=1536),
    "smollm2-360m": dict(SMOLLM2, n_layer=32, n_head=15, n_kv_head=5, n_embd=960, intermediate_size=2560),
    "smollm2-1.7b": dict(SMOLLM2, n_layer=24, n_embd=2048, intermediate_size=8192, rope_base=130000.0),
}

"""Names of a LLaMA's tensors in other formats, and the order of the rows of q and k.

Here and in Hugging Face's format these rows are half-split: rotary pair i of a head is rows i and i + hs/2. Meta and
GGUF interleave them: pair i is rows 2i and 2i + 1.
"""

from torch import Tensor

# fmt: off
FORMATS = ("ours",           "hf",                       "meta",            "gguf")
BLOCKS = ("transformer.h",   "model.layers",             "layers",          "blk")
BLOCK_NAMES = [
    ("rms_1",                "input_layernorm",          "attention_norm",  "attn_norm"),
    ("attn.q",               "self_attn.q_proj",         "attention.wq",    "attn_q"),  # parts of attn.c_attn
    ("attn.k",               "self_attn.k_proj",         "attention.wk",    "attn_k"),
    ("attn.v",               "self_attn.v_proj",         "attention.wv",    "attn_v"),
    ("attn.c_proj",          "self_attn.o_proj",         "attention.wo",    "attn_output"),
    ("rms_2",                "post_attention_layernorm", "ffn_norm",        "ffn_norm"),
    ("mlp.c_fc1",            "mlp.gate_proj",            "feed_forward.w1", "ffn_gate"),
    ("mlp.c_fc2",            "mlp.up_proj",              "feed_forward.w3", "ffn_up"),
    ("mlp.c_proj",           "mlp.down_proj",            "feed_forward.w2", "ffn_down"),
]
TOP_NAMES = [
    ("transformer.wte",      "model.embed_tokens",       "tok_embeddings",  "token_embd"),
    ("transformer.ln_f",     "model.norm",               "norm",            "output_norm"),
    ("lm_head",              "lm_head",                  "output",          "output"),
]
CONFIG_NAMES = [  # LLaMAConfig, Hugging Face's config.json, a GGUF's header
    ("block_size",           "max_position_embeddings",  "context_length"),
    ("vocab_size",           "vocab_size",               "vocab_size"),
    ("n_layer",              "num_hidden_layers",        "block_count"),
    ("n_head",               "num_attention_heads",      "attention.head_count"),
    ("n_kv_head",            "num_key_value_heads",      "attention.head_count_kv"),
    ("n_embd",               "hidden_size",              "embedding_length"),
    ("head_size",            "head_dim",                 "attention.key_length"),
    ("intermediate_size",    "intermediate_size",        "feed_forward_length"),
    ("norm_eps",             "rms_norm_eps",             "attention.layer_norm_rms_epsilon"),
    ("rope_base",            "rope_theta",               "rope.freq_base"),
]
# fmt: on
INTERLEAVED = ("meta", "gguf")


def layer_names(source: str, target: str, n_layer: int) -> dict[str, str]:
    """Maps each layer's name in one of FORMATS to its name in another, without ".weight" or ".bias"."""
    a, b = FORMATS.index(source), FORMATS.index(target)
    names = {row[a]: row[b] for row in TOP_NAMES}
    for i in range(n_layer):
        names.update({f"{BLOCKS[a]}.{i}.{row[a]}": f"{BLOCKS[b]}.{i}.{row[b]}" for row in BLOCK_NAMES})
    return names


def to_half_split(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of q or k from pairs (2i, 2i + 1) to pairs (i, i + hs/2). The shape stays (nh * hs, ...)."""
    weight = weight.unflatten(0, (-1, head_size // 2, 2))  # (nh * hs, C) -> (nh, hs/2, 2, C)
    return weight.transpose(1, 2).flatten(0, 2)  # -> (nh, 2, hs/2, C) -> (nh * hs, C)


def to_interleaved(weight: Tensor, head_size: int) -> Tensor:
    """The inverse of ``to_half_split``."""
    weight = weight.unflatten(0, (-1, 2, head_size // 2))  # (nh * hs, C) -> (nh, 2, hs/2, C)
    return weight.transpose(1, 2).flatten(0, 2)  # -> (nh, hs/2, 2, C) -> (nh * hs, C)

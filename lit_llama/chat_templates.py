"""The prompt styles of prompts.py as Jinja templates: how transformers, and servers of its folders, ask a model.

The first prompt of a conversation has the same ids both ways. A style ends a token wherever a piece ends, a template
only at control tokens: where there is none beside an earlier answer, that answer may be cut into other tokens.
"""

from __future__ import annotations

from lit_llama.prompts import ALPACA_INTRO, choose_style
from lit_llama.tokenizer import Tokenizer

# "{{-" and "{%-" drop the blanks in front, so the layout here is no part of the text.
ALPACA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
        {{- message['content'] + '\n\n' }}
    {%- else %}
        {{- 'INTRO\n\n### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}
    {%- endif %}
{%- endfor %}
""".replace("INTRO", ALPACA_INTRO.format(paired=""))

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA2 = r"""
{%- set turn = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- elif message['role'] == 'system' %}
        {%- set turn.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}
    {%- else %}
        {{- bos_token }}
        {{- '[INST] ' + turn.system + message['content'] + ' [/INST]' }}
        {%- set turn.system = '' %}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

PLAIN = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "plain": PLAIN}


def chat_template(tokenizer: Tokenizer, style: str | None) -> str | None:
    """The template of a style, or the tokenizer's own (None if it has none) where the style is None."""
    if style is None:
        return tokenizer.chat_template
    lines = TEMPLATES[choose_style(style, tokenizer)].strip().splitlines()
    return "\n".join(line for line in lines if tokenizer.bos_id is not None or line.strip() != "{{- bos_token }}")

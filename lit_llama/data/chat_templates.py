"""The prompt styles of prompts.py as Jinja templates, for transformers and servers that ask an exported model.

A template gives the same ids as its style, except where no control token separates an earlier answer from the text
around it: there a token may cross the border.
"""

from __future__ import annotations

ALPACA_INTRO = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)

# "{{-" and "{%-" remove the whitespace in front, so the layout here does not become part of the text.
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


def template_of(style: str, bos: bool) -> str:
    """The template of a style. Without ``bos``, texts do not start with a beginning-of-sequence token."""
    lines = TEMPLATES[style].strip().splitlines()
    return "\n".join(line for line in lines if bos or line.strip() != "{{- bos_token }}")


def style_of(template: str | None) -> str | None:
    """The style whose template this is; None for any other template."""
    return next(
        (style for style in TEMPLATES if template in (template_of(style, True), template_of(style, False))), None
    )

"""Chat templates render as transformers renders them."""

from __future__ import annotations

import pytest
from vocabularies import byte_level

from edgelm.text.tokenizer import Tokenizer

reference = pytest.importorskip(
    "transformers.utils.chat_template_utils", reason="needs the extra: pip install 'edgelm[distill]'"
)

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "  Où est 'le' café?  "},
    {"role": "assistant", "content": "Ici."},
    {"role": "user", "content": "Merci 😀"},
]
TEMPLATES = {
    "chatml": """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}
{% set loop_messages = messages %}{% set system = '' %}{% endif %}
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% set content = system + message['content'] if loop.index0 == 0 else message['content'] %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "loop controls, namespaces, JSON": """{%- set ns = namespace(found=false) -%}
{%- for message in messages if message.role != 'system' -%}
    {%- if ns.found -%}{%- break -%}{%- endif -%}
    {{ message | tojson }}|{{ message | tojson(indent=2) }}|{{ messages | length }}
    {%- set ns.found = true -%}
{%- endfor -%}
{% if tools is none and documents is none %}no tools{% endif %}""",
    "generation": """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content | trim }}
{% endif %}
{% endfor %}""",
    "date": "{{ strftime_now('%Y') }} {{ messages[-1]['content'] }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_does(name: str) -> None:
    template = TEMPLATES[name]
    rendered = reference.render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    tokenizer = Tokenizer(byte_level()._inner, template, bos_token="<s>", eos_token="</s>")
    assert tokenizer.render_chat(MESSAGES) == rendered[0][0]

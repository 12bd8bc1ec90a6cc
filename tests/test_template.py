"""Chat templates: what models need works, and no template can hang, eat memory or reach Python."""

import pytest

from coterie.errors import ModelError
from coterie.models.template import ChatTemplate

TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yo "},
    {"role": "user", "content": "there"},
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set prefix = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must\n alternate") }}
    {%- endif -%}
    {%- set role = "model" if message.role == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
"""


def render(source: str, messages: list[dict[str, str]] = TALK, prompt: bool = True) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, prompt)


def test_chatml() -> None:
    assert render(CHATML, TALK[:1]) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not render(CHATML, TALK, prompt=False).endswith("assistant\n")


def test_turns_with_a_system_message() -> None:
    assert render(TURNS, [{"role": "system", "content": "Be brief."}, *TALK]) == (
        "<s><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>\n"
        "<start_of_turn>user\nthere<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_can_refuse_a_conversation() -> None:
    with pytest.raises(ModelError, match="refuses this conversation: Conversation roles must alternate"):
        render(TURNS, TALK[:1] * 2)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% set a = namespace(n=1) %}{% for i in range(3) %}{% set a.n = a.n + i %}{% endfor %}{{ a.n }}",
            "4",
        ),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant, user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ 'é' | tojson }}{{ 'a' ~ 1 ~ [2] }}", '"é"a1[2]'),
        ("{{ messages[1].content.strip().upper().replace('Y', 'Z') }}", "ZO"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'a-b'.split('-')[-1] }}", "a, bb"),
        (
            "{% for m in messages %}{% if loop.last %}{{ loop.length }}{{ m.role }}{% endif %}{% endfor %}",
            "3user",
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{% macro m(x, y='d') %}[{{ x }}{{ y }}]{% endmacro %}{{ m(3) }}{{ m(4, y=5) }}", "[3d][45]"),
        ("{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}", "<in>"),
        ("{% filter upper %}a{% generation %}b{% endgeneration %}{% endfilter %}", "AB"),
        ("{% if tools %}T{% endif %}{{ missing }}{{ missing is defined }}{{ none is none }}", "FalseTrue"),
        (
            "{{ missing | default('d') }}{{ 7 // 2 }}{{ 'abc'[1:] }}{{ messages[::-1][0].content }}",
            "d3bcthere",
        ),
        ("{{ 'b' in 'abc' }}{{ 'x' not in ['x'] }}{{ (messages | first).role }}", "TrueFalseuser"),
        ("  {% if true %}\n  line\n  {% endif %}\n", "  line\n"),
        ("{{ 'a\nb' | indent(2) }}{{ strftime_now('%Y') | int > 2000 }}", "a\n  bTrue"),
        ("{% set a, b = 1, 2 %}{{ b }}{% set t %}x{{ a }}{% endset %}{{ t }}", "2x1"),
    ],
)
def test_what_templates_use_works(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ range(10**12) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ 'ab' | list | join('c' * 900000) | replace('c', 'dddddddd') }}",
        "{{ ('a\n' * 10000) | indent('b' * 1000) }}",
        "{{ 1 | round(10**9) }}",
        "{% for a in range(10000) %}" * 3 + "{% endfor %}" * 3,
        "{% for i in range(10000) %}" + "z" * 1000 + "{% endfor %}",
        "{% set x %}" + "y" * 1000 + "{% endset %}{% for i in range(10000) %}{{ x }}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        *(
            "{% set a = namespace(x='aa') %}{% for i in range(60) %}{% set a.x=" + doubled + " %}{% endfor %}"
            for doubled in ("a.x + a.x", "a.x ~ a.x", "a.x * 2", "a.x | replace('a', 'aaa')", "[a.x, a.x]",
                            "{'a': a.x, 'b': a.x}", "[a.x, a.x] | tojson", "[a.x, a.x] | join")
        ),
        "{% set ns = namespace(x=1) %}{% set ns.x = [ns] %}{{ ns }}",
        "{% set ns = namespace(x=1) %}{% for i in range(999) %}{% set ns.x = ns.x * 9 %}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "1+" * 20000 + "1 }}",
        "{% if x %}" * 900 + "{% endif %}" * 900,
        "x" * 10**6,
    ],
)  # fmt: skip
def test_templates_that_would_hang_or_eat_memory_are_refused(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{", "{% foo %}", "{{ 'x' | foo }}", "{{ 1 / 0 }}", "{{ [1, 'a'] | sort }}", "{{ missing.a }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ lipsum() }}",
        "{{ cycler('a') }}", "{% include 'x' %}", "{% block b %}{% endblock %}", "{{ messages | _made }}",
        "{{ ''.join.__globals__.x() }}", "{{ raise_exception('no\nway') }}", "{{ 10.0 ** 400 }}",
        "{{ dict.__base__() }}", "{{ messages[0].update({}) }}", "{{ range.__init__.__globals__['os'].x() }}",
    ],
)  # fmt: skip
def test_what_is_wrong_or_forbidden_is_said_in_one_line(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_long_conversations_are_not_taken_for_an_attack() -> None:
    talk = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 500} for i in range(401)]
    assert len(render(TURNS, talk)) > 401 * 2400
    quadratic = (
        "{% for m in messages %}{% if (messages | length) - 1 == loop.index0 %}{{ m.content }}{% endif %}"
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length > 1000 %}x{% endif %}"
        "{% endfor %}"
    )
    assert render(quadratic, talk) == talk[-1]["content"]

"""Chat templates: like transformers', within bounds (ADV-13, ADV-31)."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from demo_model import demo_metadata, demo_template
from hybrid_serve.text import chat_template
from hybrid_serve.text.chat_template import ChatTemplate, ChatTemplateError

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi\n"}],
    [
        {"role": "user", "content": "<b>&amp; 'quotes' {{ braces }} 日本"},
        {"role": "assistant", "content": " yes "},
        {"role": "user", "content": ""},
    ],
]
# Features that published templates use, in one each.
TEMPLATES = [
    "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content | trim }}\n    {% endif %}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}{{ {'a': '<é>'} | tojson }}",
    "{% macro say(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages[-1].content.split('\\n')[0].upper() }}{% if tools is not none %}tools{% endif %}",
    "{% for m in messages if m.role != 'system' %}{{ '%s:%s' % (m.role, m.content) }}{{ '-' * 3 }}{% endfor %}",
]


def transformers_render(source: str, messages: list[dict[str, Any]], **values: Any) -> str:
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = module.render_jinja_template([messages], chat_template=source, **tokens, **values)
    return str(rendered[0])


@pytest.mark.parametrize("source", [None, *TEMPLATES])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(
    source: str | None, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    source = source or str(demo_metadata()["tokenizer.chat_template"])
    expected = transformers_render(source, messages, add_generation_prompt=add_generation_prompt)
    template = ChatTemplate(source, "<s>", "</s>")
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_continuing_the_final_message_equals_transformers() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The sky is "}]
    source = str(demo_metadata()["tokenizer.chat_template"])
    expected = transformers_render(source, messages, continue_final_message=True)
    assert demo_template().render(messages, continue_final_message=True).rstrip() == expected.rstrip()
    assert demo_template().render(messages, continue_final_message=True).endswith("assistant\nThe sky is ")


def test_a_final_message_that_the_template_hides_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match="cannot be continued"):
        template.render([*CONVERSATIONS[0], {"role": "assistant", "content": "a"}], continue_final_message=True)


def test_template_can_refuse_a_conversation_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])


def test_todays_date_is_at_hand() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]).isdigit()


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.__class__ }}",
        "{{ namespace.__init__.__globals__['os'] }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ range.__self__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ (1).__class__.__base__ }}",
        "{{ ().__getattribute__('x') }}",
        "{% set x = dict.__base__ %}",
        "{{ lipsum.__globals__ }}",
        "{% include '/etc/passwd' %}{{ __import__('os') }}",
        "{% for c in [].__class__.__base__.__subclasses__() %}{% endfor %}",
        "{{ messages[0]['__dict__'] }}",
        "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}",
    ],
)
def test_known_escapes_from_the_sandbox_are_refused_when_the_template_is_loaded(source: str) -> None:
    """ADV-13"""
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['_' ~ '_class_' ~ '_'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
    ],
)
def test_what_only_shows_when_rendering_is_refused_then(source: str) -> None:
    """ADV-13: the conversation is left as it was."""
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(ChatTemplateError) as refused:
        ChatTemplate(source).render(messages)
    assert not re.search(r"site-packages|\.py|0x[0-9a-f]{6}", str(refused.value))  # ADV-53
    assert messages == [{"role": "user", "content": "x"}]


def test_formatting_strings_reaches_no_attributes() -> None:
    """ADV-13"""
    for call in ("'<{0.__class__}>'.format(1)", "'<{x.__class__}>'.format_map({'x': 1})"):
        assert ChatTemplate("{{ " + call + " }}").render([]) == "<>"
    assert ChatTemplate("{{ '{}-{}'.format(1, 'a') }}").render([]) == "1-a"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10**9 }}",
        "{{ [0] * 10**9 }}",
        "{{ 2 ** 1000000000 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'.center(width=10**9) }}",
        "{% for i in range(60000) %}{{ messages[0].content * 1000 }}{% endfor %}",
    ],
)
def test_a_template_that_burns_time_or_memory_ends_in_an_error_within_its_limit(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ADV-31"""
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.3)
    template = ChatTemplate(source)
    start = time.process_time()
    with pytest.raises(ChatTemplateError):
        template.render(CONVERSATIONS[0])
    assert time.process_time() - start < 2.0


def test_syntax_errors_name_the_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        ChatTemplate("ok\n{% for %}")


def test_time_of_a_long_conversation_grows_linearly() -> None:
    """ADV-32"""

    def seconds(count: int) -> float:
        messages = [{"role": "user", "content": "word " * 10}] * count
        start = time.process_time()
        demo_template().render(messages)
        return time.process_time() - start

    assert min(seconds(8000) for _ in range(3)) < 2.6 * 2 * min(seconds(4000) for _ in range(3))

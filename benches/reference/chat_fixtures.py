"""Chat templates of the known styles, written for this purpose, and what transformers renders from them.

    python chat_fixtures.py

writes controlgen-text/tests/fixtures/chat.json: `templates` by name, `conversations` and `tools` by name, `cases`
`{template, conversation, options, text | error}`, and `expressions`: `{source, text | error}`, small programs that try
what templates take from Jinja and Python. The date is always 2024-07-26 23:59:59.
"""

import datetime as clock
import re

from common import TEXT_FIXTURES, write_json

from transformers.utils import chat_template_utils

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class FixedDate(clock.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 23, 59, 59)


chat_template_utils.datetime = FixedDate

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "llama2": """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = '<<SYS>>\\n' + messages[0]['content'].strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if loop.index0 == 0 -%}{%- set content = system_message ~ message['content'] -%}
    {%- else -%}{%- set content = message['content'] -%}{%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' -%}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|header|>system<|end_header|>\\n\\n" }}
{{- "Today is " + date_string + ".\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("Only one call at a time!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|header|>assistant<|end_header|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot|>" }}
    {%- else %}
        {{- "<|header|>ipython<|end_header|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|end_header|>\\n\\n' }}{%- endif %}
""",
    "mistral": """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + (message.tool_call_id or 'none') + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Unknown role " ~ message.role ~ "!") }}{%- endif %}
{%- endfor %}
""",
    "qwen": """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "gemma": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}{%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("Conversation roles must alternate") }}{%- endif -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model\\n'}}{%- endif -%}
""",
    "documents": """\
{%- macro show(document, number=1) %}
[{{ number }}] {{ document.title | default('untitled', true) }}: {{ document['text'] }}
{% endmacro -%}
{%- for document in documents or [] %}
{{ show(document, number=loop.index) }}
{%- endfor %}
{% for message in messages -%}
{% generation %}
{{ message.role | upper }}: {{ message.content }}{{ eos_token if not loop.last else '' }}
{%- endgeneration %}
{% if loop.index >= 3 %}{% break %}{% endif %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% endfor %}
{#- a comment #}
{{ strftime_now('%Y-%m-%d %H:%M') }} {{ thinking_budget | default(7) }}
""",
}

TOOLS = [
    {"type": "function", "function": {
        "name": "temperature", "description": "It's \"warm\" <b>&</b> naïve 🌡", "parameters": {
            "type": "object", "properties": {
                "place": {"type": "string", "description": "City/Stadt \\ \t tab"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": []},
                "scale": {"type": "number", "minimum": -273.15, "maximum": 1e20, "default": 1.0}},
            "required": ["place"]}}},
    {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},
]

CONVERSATIONS = {
    "hello": [{"role": "user", "content": "Hello!"}],
    "system": [{"role": "system", "content": " Be brief. \n"}, {"role": "user", "content": "  What's 2 < 3 & 4? \n"},
               {"role": "assistant", "content": " Yes. "}, {"role": "user", "content": "ça va 😀 {{ x }}"}],
    "unordered": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "calls": [{"role": "user", "content": "How warm?"},
              {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdef123", "type": "function", "function": {
                  "name": "temperature", "arguments": {"place": "Zürich \"ZH\"", "days": [1, 2], "ok": True, "none": None, "x": 0.1}}}]},
              {"role": "tool", "content": "21.5", "tool_call_id": "abcdef123", "name": "temperature"},
              {"role": "assistant", "content": "21.5 °C"}, {"role": "user", "content": "Thanks"}],
    "two_calls": [{"role": "user", "content": "Both?"},
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"id": "aaaaaaaaa", "function": {"name": "now", "arguments": {}}},
                      {"id": "bbbbbbbbb", "function": {"name": "temperature", "arguments": {"place": "x"}}}]},
                  {"role": "tool", "content": "noon", "tool_call_id": "aaaaaaaaa"}, {"role": "tool", "content": {"content": [1, "a"]}, "tool_call_id": "bbbbbbbbb"}],
    "thinking": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
                 {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4", "reasoning": "add again\n"}],
    "parts": [{"role": "system", "content": [{"type": "text", "text": "See."}]},
              {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": " What? "}]}],
    "empty": [],
}

OPTIONS = [{}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "tools": TOOLS, "enable_thinking": False},
           {"documents": [{"title": "T", "text": "one"}, {"text": "two"}], "thinking_budget": 0, "date_string": "1 Jan"}]

# What templates use of Jinja's filters and tests, and of Python's methods and ways to write values.
EXPRESSIONS = """
{{ true }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1 / 3 }}
{{ [1, 'a', none, true, 1.5] }} {{ {'a': 1, 'b': [none, {'c': "it's"}]} }}
{{ ['a', "it's", 'say "hi"', 'nl\\n'] }}
{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1] }}
{{ 'a' 'b' }} {{ 'x' * 3 }} {{ [1] * 2 }} {{ [1] + [2, 3] }}
{{ 'abc'[1] }} {{ 'abc'[-1] }} {{ 'abcdef'[1:3] }} {{ 'abcdef'[:-2] }} {{ 'abcdef'[::2] }} {{ 'abc'[::-1] }} {{ [1, 2, 3][::-1] }} {{ [1, 2, 3][-2:] }} {{ 'é😀x'[1] }}
{{ messages[0].content }} {{ messages[0]['content'] }} {{ messages[5] is defined }} {{ messages[0].nothing is defined }} {{ messages[0].get('nothing') }} {{ messages[0].get('nothing', 'd') }}
{{ nothing }}|{{ nothing is none }} {{ nothing is undefined }} {{ nothing or 'x' }} {{ not nothing }}
{{ nothing.field }}
{{ nothing + 'a' }}
{{ 'a' in nothing }}
{% for x in nothing %}x{% else %}none{% endfor %}
{{ none.field is defined }}
{{ 'a' in 'abc' }} {{ 'z' not in ['a'] }} {{ 'role' in messages[0] }} {{ 1 in [1, 2] }}
{{ 1 == 1.0 }} {{ '1' == 1 }} {{ none == false }} {{ 'a' < 'b' }} {{ 1 < 2 < 3 }} {{ [1] == [1] }} {{ {'a': 1} == {'a': 1} }}
{{ 'yes' if 1 else 'no' }}{{ 'x' if false }} {{ (1 and 'a') }} {{ ('' or 'b') }} {{ not '' }}
{{ '  x y '.strip() }}|{{ 'xxax'.strip('x') }}|{{ '\\n\\na\\n'.lstrip('\\n') }}|{{ 'a.\\n'.rstrip() }}|{{ 'abcba'.strip('ab') }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a-b-c'.split('-', 1) }} {{ 'a-b-c'.rsplit('-', 1) }} {{ 'abc'.split('x')[-1] }}
{{ 'a=b'.partition('=') }} {{ 'a=b=c'.rpartition('=')[0] }} {{ 'prefix_x'.removeprefix('prefix_') }} {{ 'x.txt'.removesuffix('.txt') }}
{{ 'hello world'.title() }} {{ 'hello World'.capitalize() }} {{ 'Ab'.upper() }} {{ 'Ab'.lower() }} {{ 'Ab'.swapcase() }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('c', 'd')) }} {{ 'abcabc'.find('c') }} {{ 'abcabc'.rfind('c') }} {{ 'abcabc'.count('b') }} {{ 'abc'.replace('b', 'x') }} {{ 'aaa'.replace('a', 'b', 2) }} {{ 'abc'.index('b') }}
{{ 'a1'.isalnum() }} {{ '12'.isdigit() }} {{ 'ab'.isalpha() }} {{ ''.isdigit() }} {{ ' '.isspace() }} {{ 'AB'.isupper() }}
{{ ', '.join(['a', 'b']) }} {{ 'a\\nb\\n'.splitlines() }} {{ '{} and {}'.format('a', 2) }} {{ '%s=%d' % ('a', 2) }} {{ '%05.2f' % 3.14159 }} {{ '{:>4}|{:<4}|{:.2f}'.format('a', 'b', 1.5) }} {{ '{0}{1}{0}'.format('a', 'b') }} {{ '{x}'.format(x=1) }}
{{ {'a': 1, 'b': 2}.items() | list }} {{ {'a': 1}.keys() | list }} {{ {'a': 1}.values() | list }} {% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %} {% for k in {'b': 1, 'a': 2} %}{{ k }}{% endfor %} {% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %} {% for k, v in {'b': 1} | items %}{{ k }}{% endfor %}
{{ [3, 1, 2] | sort }} {{ ['b', 'A'] | sort }} {{ [1, 2] | reverse | list }} {{ [1, 1, 2] | unique | list }} {{ [1, 2, 3] | sum }} {{ [1, 5, 3] | max }} {{ [1, 5] | min }} {{ 'abc' | first }} {{ [1, 2] | last }} {{ 'abc' | length }} {{ {'a': 1} | length }} {{ [1, 2] | count }} {{ 'abc' | list }} {{ 'abc' | reverse }}
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | list }} {{ ['a', 'b'] | map('upper') | join }} {{ [1, 2, 3, 4] | select('even') | list }} {{ [1, 2, 3] | reject('odd') | list }} {{ [0, 1, '', 'a'] | select | list }}
{{ 'x' | default('y') }} {{ nothing | default('y') }} {{ '' | default('y', true) }} {{ none | default('y') }} {{ nothing | d('z') }}
{{ ' a ' | trim }} {{ 'ab' | upper }} {{ 'ab cd' | title }} {{ 'ab' | capitalize }} {{ 'aXbX' | replace('X', '-') }} {{ '5' | int + 1 }} {{ 'x' | int }} {{ '2.5' | float }} {{ 2.567 | round(2) }} {{ 2.5 | round }} {{ '12' | int(3) }} {{ 'x' | int(3) }} {{ none | int }} {{ '3.9' | int }} {{ -3.9 | int }} {{ 'x' | float }} {{ 'x' | float(1.5) }} {{ none is iterable }} {{ none is sequence }} {{ 1 is iterable }} {{ nothing is iterable }} {{ nothing is sequence }} {{ 1 is callable }} {{ 'x'.index('y') }} {{ -3 | abs }} {{ 3 | string + 'a' }} {{ 1.0 | int }} {{ true | int }} {{ [1, 'a'] | string }} {{ none | string }}
{{ 'a\\nb\\nc' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a\\n\\nb' | indent(4) }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }} {{ [1, 2, 3, 4, 5] | slice(2) | list }} {{ 'a b c' | wordcount }} {{ '<a>' | escape }} {{ '<a>' | e }} {{ '<a>' | safe }} {{ 'long text here' | truncate(8) }} {{ '%s-%s' | format('a', 'b') }} {{ {'a': {'b': 1}} | attr('a') }}
{% for g in messages | groupby('role') %}{{ g.grouper }}:{{ g.list | length }} {% endfor %}
{{ {'é': "it's <b>&", 'n': none, 'f': 1.5, 'i': 10, 't': true, 'l': [], 'd': {}, 's': 'q"\\\\\\n\\t'} | tojson }}
{{ {'b': [1, {'c': 2}], 'a': []} | tojson(indent=2) }} {{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }} {{ {'b': 1, 'a': {}} | tojson(indent=2, sort_keys=true) }}
{{ 1e16 | tojson }} {{ 123456789012345680.0 | tojson }} {{ 1e-5 | tojson }} {{ 0.0001 | tojson }} {{ 1e22 | tojson }} {{ -0.0 | tojson }} {{ 5e-324 | tojson }} {{ 'a' | tojson }} {{ none | tojson }} {{ (1, 2) | tojson }} {{ {1: 2} | tojson }} {{ 12345678901234567890 | tojson }} {{ '\\x7f' | tojson }} {{ '\u2028' | tojson }}
{{ 1 is number }} {{ 'a' is string }} {{ {} is mapping }} {{ [] is sequence }} {{ [] is iterable }} {{ 'a' is iterable }} {{ 'a' is sequence }} {{ {} is iterable }} {{ {} is sequence }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is boolean }} {{ true is true }} {{ false is false }} {{ none is none }} {{ 2 is even }} {{ 4 is divisibleby(2) }} {{ 1 is eq 1 }} {{ 1 is in [1] }} {{ raise_exception is callable }} {{ true is number }} {{ true is integer }} {{ 'a' is lower }} {{ 1 is sameas 1 }}
{% set ns = namespace(a=1, b=[]) %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% set ns.b = ns.b + [i] %}{% endfor %}{{ ns.a }} {{ ns.b }}
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}{% with x = 4 %}{{ x }}{% endwith %}{{ x }}
{% set text %}a{{ 1 }}b{% endset %}{{ text | upper }} {% filter upper %}abc{% endfilter %} {% set a, b = 1, 2 %}{{ a }}{{ b }} {% set t = (1, 2) %}{{ t }} {{ t[0] }}
{% macro f(a, b='x', c=none) %}[{{ a }}{{ b }}{{ c }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f(1) }}{{ f(1, c=2) }}{{ f(b=3, a=4) }}
{% macro f(a) %}[{{ a }}{{ caller() }}]{% endmacro %}{% call f(1) %}body{% endcall %}
{% for i in range(3) %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.changed(i) }} {% endfor %}
{% for i in range(5, 0, -2) %}{{ i }}{% endfor %}{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% for i in [1, 2, 3] if i > 1 %}{{ i }}{% endfor %}{% for i in 'ab' %}{{ i }}{% endfor %}
{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for n in [{'v': 1, 'c': [{'v': 2, 'c': []}]}] recursive %}{{ n.v }}{{ loop(n.c) }}{% endfor %}
{% raw %}{{ raw }}{% endraw %} {# comment #}{{- ' a' -}} b {%- if true +%} c{% endif %}
a
  {% if true %}
  b
    {%- if true %}
 c
    {% endif %}
  {% endif %}
d
{{ dict(a=1, b=2) }} {{ lipsum is defined }} {{ cycler is defined }} {{ joiner is defined }} {{ range(3) | list }} {{ zip is defined }}
{{ strftime_now('%d %B %Y, %A %j %-d %I %p') }}
{{ messages | tojson }}
{{ messages[0].items() | list }}
{{ messages | length > 1 and messages[1].role == 'assistant' }}
{{ 'a' if messages[0].content is defined and 'ello' in messages[0].content else 'b' }}
{{ (messages | selectattr('role', 'in', ['user', 'tool']) | list)[0].content }}
{{ messages[-1].content[:4] + '...' }} {{ messages[-1]['content'].split()[0] }}
{{ '<|' ~ messages[0].role ~ '|>' }} {{ "tab\\there" }} {{ 'uni\\u00e9' }} {{ 'quote\\'s' }}
{{ 1_000 }} {{ 0x1f }} {{ 1.5e3 }} {{ -1 }} {{ +1 }} {{ 5 % 3 }} {{ (1, ) }} {{ () }}
{{ messages is sequence and messages is not mapping and messages is not string }}
{{ [1, 2, 3] | join(', ') }} {{ [[1, 2], [3]] | sum(start=[]) }} {{ ['a', 'b', 'c'] | join(', ') | upper }}
{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | list }} {{ [{'a': {'b': 1}}] | map(attribute='a.b') | list }} {{ [{'a': 1}, {}] | map(attribute='a', default=0) | list }}
{{ 'ß'.upper() }} {{ 'İ'.lower() }} {{ 'ǆ'.title() }} {{ "they're bill's".title() }} {{ "they're bill's" | title }}
{{ raise_exception('stop: ' ~ messages[0].role) }}
{{ 'abc' | nonsense }}
{{ 'abc'.nonsense() }}
{{ nonsense() }}
{{ 1 + 'a' }}
{{ messages.append(1) }}
{% if true %}
""".replace("\\x7f", "\x7f").strip("\n")


def render(template, conversation, options):
    options = {"tools": None, "add_generation_prompt": False, **TOKENS, **options}
    rendered, _ = chat_template_utils.render_jinja_template([conversation], chat_template=template, **options)
    return rendered[0]


def outcome(template, conversation, options):
    try:
        return {"text": render(template, conversation, options)}
    except Exception as error:
        return {"error": str(error)}


def sources():
    """One program a line; the lines from a lone `a` to `d` are one program."""
    lines, block = [], None
    for line in EXPRESSIONS.split("\n"):
        if block is None and line == "a":
            block = [line]
        elif block is not None:
            block.append(line)
            if line == "d":
                lines.append("\n".join(block))
                block = None
        elif "{%" in line or "{#" in line:
            lines.append(line)
        else:
            # Expressions stand alone, so that each is tried.
            lines += re.findall(r"\{\{.*? \}\}", line)
    return lines


if __name__ == "__main__":
    cases = []
    for name, template in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for number, options in enumerate(OPTIONS):
                cases.append({"template": name, "conversation": conversation, "options": number, **outcome(template, messages, options)})
    # A date is given or not; one template has its own for want of one.
    expressions = [{"source": source, **outcome(source, CONVERSATIONS["system"], {})} for source in sources()]
    value = {"tokens": TOKENS, "templates": TEMPLATES, "conversations": CONVERSATIONS, "options": OPTIONS, "cases": cases, "expressions": expressions}
    write_json(TEXT_FIXTURES / "chat.json", value, compact=True)
    print(len(cases), "cases,", sum("error" in c for c in cases), "refused;", len(expressions), "expressions")
    for case in cases:
        if "error" in case and "ust alternate" not in case["error"]:
            print(case["template"], case["conversation"], case["options"], case["error"][:100])

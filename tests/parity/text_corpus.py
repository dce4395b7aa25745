"""What text_parity.py feeds to both sides: texts, conversations and templates, handwritten or from a seeded generator."""
import copy

ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "accents": "éèüñçøåßœžşğİıſK",
    "digits": "0123456789٣५④½²Ⅷ〇",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяЁё",
    "greek": "αβγδεζηθικλμνξοπρσςτυφχψωΆ",
    "han": "的一是不了人我在有他这中大来上国個説東京漢字龍𠀀𪜀",
    "kana": "あいうえおカキクケコがぎぐパピプー々ゝ",
    "hangul": "가나다라마바사한국어ㄱㅏ\u1100\u1161\u11a8",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهوي\u064b\u0651",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת\u05b0\u05b7",
    "indic": "कखगघङचछजझञा\u0940\u094d\u093cதமிழ்ভাষা",
    "thai": "กขคงจฉชซ\u0e34\u0e38\u0e48\u0e49",
    "combining": "e\u0301a\u0308o\u0302\u0323n\u0303\u0344\u0f73\u2126\u212b\ufb01\u1e9b\u0323",
    "emoji": "😀🎉❤️👍🏽👩‍👩‍👧‍👦🇩🇪🏳️‍🌈\u200d\ufe0f⌚️#️⃣",
    "space": " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff",
    "punctuation": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…—“”«»。、！？·",
    "controls": "\x00\x01\x07\x08\x1b\x7f\x80\x9f\u00ad\u202e\ufffd\ufffe\uffff\U0010ffff\ue000",
}
WORDS = ["Hello", " world", "'s", "'T", "'LL", "'ſ", "don't", "I'VE", "\r\n", "\n\n", "   ", "\t", "    return x;\n", "3.14159",
         "2026-07-31", "https://example.com/a?b=c&d=%20", "def f(a, b=None):\n", "{\"k\": [1, 2.5e-3, null]}", "```python\n",
         "你好，世界", "東京都", "안녕하세요", "Привет, мир!", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดี", "Ünïcödé", "ﬁne", "Å", "e\u0301",
         "👨‍👩‍👧‍👦", "🇺🇳", "<|im_start|", "im_end|>", "<think", "</tool_call", "<tool_call >", "\ufffd", "x" * 40]


def random_text(rng, added_tokens):
    parts = []
    for _ in range(rng.randrange(1, 20)):
        kind = rng.random()
        if kind < 0.3:
            parts.append(rng.choice(WORDS))
        elif kind < 0.42:
            parts.append(rng.choice(added_tokens))
        elif kind < 0.47:
            token = rng.choice(added_tokens)
            parts.append(token[:rng.randrange(len(token))] + rng.choice(["", " ", token]))
        else:
            names = rng.sample(list(ALPHABETS), rng.randrange(1, 4))
            letters = "".join(ALPHABETS[name] for name in names)
            parts.append("".join(rng.choice(letters) for _ in range(rng.randrange(1, 12))))
        parts.append(rng.choice(["", "", " ", "  ", "\n"]))
    return "".join(parts)


def handwritten_texts(added_tokens):
    texts = ["", " ", "\n", "Hello world", " leading", "trailing ", "a  b   c    d", "\n\n\n  x", "  \n  \n", "\t\tif x:\n\t\t\ty()\n",
             "I'm you're he'll they've I'd can't it's", "I'M YOU'RE HE'LL", "o'ſt o'Ke 'ſ", "12345 1,234.5 ½ ² ④ ٣٤ Ⅷ",
             "naïve café\u0301 e\u0301 \u1e9b\u0323 \u212b \u2126 ﬁ", "\u0344\u0958\u2adc\ufb1d", "각각 \u1100\u1161\u11a8", "\x00\x01\x02\x7f\x80\x9f",
             "a\u00a0b\u2003c\u3000d\u200be\ufefff", "\r\n\r\n x\r y\n\r", "\x1c\x1d\x1e\x1f\x85\u2028\u2029",
             "👩‍👩‍👧‍👦❤️🇩🇪👍🏽", "𠀀𪜀\U0001f9ff\U0010ffff", "\ufffd \ufffe\uffff", "Ａｂｃ　１２３", "“quotes” — dash… ·", "((((((((([[[[{{{{<<<<", "!!!???...,,,;;;:::",
             "#include <vector>\nint main() {\n  return 0; // end\n}\n", "SELECT * FROM t WHERE a='b''c';", "<div class=\"x\">&amp;</div>",
             "base64 iVBORw0KGgoAAAANSUhEUgAAAAUA", "C:\\Users\\x\\n", "ไทยไม่มีช่องว่าง", "कर्म क्षेत्र ज़", "ภาษา\u0e33\u0e4d", "שָׁלוֹם", "كِتَابٌ"]
    for token in added_tokens:
        texts += [token, f"a{token}b", f" {token} ", f"{token}{token}\n", token[:-1], token.upper(), f"{token[0]} {token[1:]}"]
    texts.append("<|im_start|>system\nYou are.<|im_end|>\n<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 12 +
                 "<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n<tool_call>\n{\"name\": \"f\"}\n</tool_call>")
    return texts


TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Wetter für <Ort> & \"Zeit\" 天气 \u2028 \x7f",
     "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["東京", "Zürich", "</tool_call>"]},
                    "items": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 1e16}}, "values": {"type": "object"},
                    "keys": {"type": "boolean", "default": False}, "get": {"type": ["number", "null"], "default": None}},
                    "required": ["place"], "additionalProperties": False}, "strict": True}},
    {"type": "function", "function": {"name": "z", "description": "", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "f", "description": "line\none\ttab \\ back 'q'", "parameters": {
        "b": 1.0, "a": [1, 2.5, -0.0, 1e-7, 1e22, 123456789012345680.0, 0.1, 5e-324, 9007199254740993], "c": {"z": {}, "y": []}},
        "return": {"type": "string"}}},
]
IMAGE = {"type": "image", "image": "a.png"}
IMAGE_URL = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
VIDEO = {"type": "video", "video": "a.mp4"}


def text(value):
    return {"type": "text", "text": value}


def call(name, arguments, **extra):
    return {"type": "function", "id": "call_1", **extra, "function": {"name": name, "arguments": arguments}}


def conversations(rng):
    """Contexts as apply_chat_template takes them. Every one is rendered with and without tools, prompt and thinking."""
    user, system = {"role": "user", "content": "Hi 你好 😀"}, {"role": "system", "content": "You are \"kind\".\n"}
    answer = {"role": "assistant", "content": "  Hello!\n\n"}
    thought = {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nIt is 4."}
    reasoned = {"role": "assistant", "reasoning_content": "\nstep one\n", "content": "\n\nDone.\n"}
    calls = {"role": "assistant", "content": "", "tool_calls": [
        call("get_weather", {"place": "東京", "n": [1, {"a": None, "b": True}], "x": 1.5}), call("z", {})]}
    string_calls = {"role": "assistant", "content": "On it.", "tool_calls": [call("get_weather", "{\"place\": \"Zürich\"}")]}
    bare_call = {"role": "assistant", "content": "", "tool_calls": [{"name": "z", "arguments": {"k": "v'\"<>&"}}]}
    result, result_two = {"role": "tool", "content": "{\"t\": 21.5}"}, {"role": "tool", "content": "über 20°"}
    result_parts = {"role": "tool", "content": [text("seen:"), IMAGE]}
    mixed = {"role": "user", "content": [IMAGE, text("What is "), IMAGE, text("this?"), VIDEO]}
    base = [
        [user], [system, user], [system, user, answer, user], [user, thought, user, reasoned, user], [user, thought],
        [system, user, calls, result, result_two], [system, user, calls, result, answer, user],
        [user, string_calls, result, reasoned, user], [user, bare_call, result_two, user], [user, reasoned, {**calls, "reasoning_content": "why"}, result],
        [mixed], [system, mixed, answer, {"role": "user", "content": [VIDEO, VIDEO]}], [user, calls, result_parts, answer],
        [{"role": "system", "content": [text("You see.")]}, {"role": "user", "content": [text("a"), text("b")]},
         {"role": "assistant", "content": [text("c")]}, user],
        [{"role": "user", "content": [IMAGE_URL, text("url")]}], [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \x1c\x1f\u3000 <|im_end|> {{ 7*7 }} {% if %} \r\n "}, {"role": "assistant", "content": "\u2003x\x1e"}, user],
        [{"role": "user", "content": "<tool_response>\nfake\n</tool_response>"}, answer, user],
        [user, {"role": "assistant", "content": "a</think>b</think>\n\nc", "tool_calls": []}, user, user], [answer], [system],
        [{"role": "developer", "content": "dev"}, user], [{"role": "unknown", "content": "?"}, user],
    ]
    contexts = []
    for messages in base:
        for tools in (None, TOOLS):
            context = {"messages": messages, "add_generation_prompt": rng.random() < 0.7}
            if tools:
                context["tools"] = tools[:rng.randrange(1, 4)]
            extra = rng.choice([{}, {}, {"enable_thinking": False}, {"enable_thinking": True}, {"add_vision_id": True}])
            contexts.append(copy.deepcopy({**context, **extra}))
    contexts.append({"messages": [user, {"role": "assistant", "content": "The answer is"}], "continue_final_message": True})
    contexts.append({"messages": [user, {"role": "assistant", "content": "The answer is "}], "continue_final_message": True})
    contexts.append({"messages": [user, {"role": "assistant", "content": [text("a"), text("b ")]}], "continue_final_message": True})
    return contexts


def hard_templates():
    """(template, extra context): where Jinja2 on Python and minijinja are likely to differ, or would be missed the most.
    What is known to differ is listed in docs/text.md and not here."""
    data = {"v": {"s": "it's", "q": 'say "x"', "n": None, "t": True, "f": 1.0, "big": 1e22, "small": 1e-5, "i": -3,
                  "list": [1, "a", None, [True]], "map": {"items": 1, "b": {"get": 2}, "": []}, "u": "ünï\u200b\u0301\n\\\x7f", "e": "", "neg0": -0.0}}
    expressions = [
        "v.s", "v.n", "v.t", "v.f", "v.big", "v.small", "v.i", "v.list", "v.map", "v", "v.u", "[v.u, v.q, v.s]", "v.missing", "v.neg0",
        "v | tojson", "v | tojson(indent=2)", "v.map | tojson(indent=4)", "v.u | tojson", "v.u | tojson(ensure_ascii=True)", "[] | tojson(indent=2)",
        "v.list | tojson(separators=(',', ':'))", "v.map | tojson(sort_keys=True)", "v.f | tojson", "v.list | string", "v.t | string", "v.f | string",
        "v.map.items() | list | length", "v.list ~ ''", "v.list | upper", "v.map ~ v.list", "[v.list] | join", "v.map | length", "v.map | string", "v.t and v.n", "v.map.keys() | list", "v.map.values() | list", "v.map['items']", "v.map.get('nope', 7)", "v.map.get('nope')", "v.map.b.get('get')",
        "'a,b,,c'.split(',')", "'  a b \x1f c  '.split()", "' a b c '.split(None, 1)", "'a b c'.rsplit(' ', 1)", "'a-b'.split('-')[-1]", "'\x1f x \x1c'.strip() | length",
        "'xxabxx'.strip('x')", "'\\n\\nab\\n'.lstrip('\\n')", "'ab\\n'.rstrip('\\n')", "'aüb'.find('b')", "'aübb'.rfind('b')", "'ab'.find('z')",
        "'a\\nb\\r\\nc\\x85d'.splitlines()", "'Ab'.upper() ~ 'Ab'.lower() ~ 'hello world'.title() ~ 'hELLO'.capitalize()", "'abc'.startswith('ab')",
        "'abc'.startswith(('x', 'a'))", "'abc'.endswith('bc')", "'a b a'.replace('a', 'z')", "'a b a'.replace('a', 'z', 1)", "'a'.join(['x','y'])", "''.isdigit()",
        "'12'.isdigit()", "'prefix-x'.removeprefix('prefix-')", "'x.py'.removesuffix('.py')", "'abcab'.count('ab')", "'abc'[::-1]", "'abc'[1:]", "'abcdef'[-2:]", "v.list[::-1]", "v.list[-1]",
        "v.s is string", "v.n is none", "v.t is number", "v.i is number", "v.f is float", "v.i is integer", "v.t is integer", "v.t is boolean", "v.list is iterable", "v.s is iterable",
        "v.map is iterable", "v.i is iterable", "v.n is iterable", "v.s is sequence", "v.map is sequence", "v.list is sequence", "v.n is sequence", "v.i is sequence", "v.map is mapping",
        "v.list is mapping", "v.nope is defined", "v.nope is undefined", "v.nope.x is defined if v.nope is defined else 'no'", "v.e or 'fallback'", "v.nope or 'fallback'", "v.n is not none",
        "'a' in v.map.b", "'items' in v.map", "'t' in v.s", "2 in [1, 2]", "v.list | length", "v.nope | length", "v.nope | default('d')", "v.n | default('d')", "v.n | default('d', true)",
        "v.list | first", "v.list | last", "[3,1,2] | sort | join(',')", "['b','a'] | join", "[1,2,3] | sum", "[1,2] + [3]", "'a' ~ 1 ~ none ~ true", "'a' + 'b'", "'ab' * 3", "7 // 2", "7 % 3", "7 / 2", "2 ** 10", "-7 // 2",
        "'%05.2f' | format(3.14159)", "[{'a': 1}, {'a': 2}] | map(attribute='a') | list", "[{'a': 1, 'b': 0}, {'a': 2}] | selectattr('b', 'defined') | list",
        "[{'r': 'x'}, {'r': 'y'}] | selectattr('r', 'equalto', 'y') | list", "[{'r': 'x'}, {'r': 'y'}] | rejectattr('r', 'eq', 'y') | map(attribute='r') | join", "[1, 0, 2] | select | list",
        "'  x ' | trim", "'\x1fx\x1c' | trim", "'a<b>&' | e", "'a\\nb' | indent(2)", "'abc' | upper | lower | capitalize | title", "'abc' | replace('b', 'x')", "[1, 2, 3] | batch(2) | list", "v.map | dictsort | map('first') | list", "'3' | int + 1",
        "'abc' | list", "'x' if v.t", "'x' if v.n", "1 if 0 else 2", "(1, 2)[0]", "{'a': 1}.a", "{'a': {'b': 2}}['a']['b']", "range(3) | list", "range(1, 7, 2) | list", "dict(a=1)", "namespace(a=1).a",
        "v.list[1] == 'a' and not v.e", "1 < 2 and 2 <= 2", "'a' < 'b'", "not v.nope", "v.s | length", "'ü😀' | length", "'ü😀'[1]", "'\\u00fc\\x41\\t|'", "loop is defined", "messages[0].content", "messages[0]['role']", "messages | length",
        "[1,2,3][1:] | map('string') | join('+')", "['a', 'b'] | reverse | list", "[1, 1, 2] | unique | list", "v.map | items | map('last') | list", "[[1, 2], [3]] | map('length') | list", "{'b': 1, 'a': 2} | list", "'a' 'b'",
        "1.0 * 3", "0.1 + 0.2", "1e3", "10000000000000000000", "v.f == 1", "'a' if v.missing is defined and v.missing else 'b'", "3 | abs", "2.6 | round", "[2,9,4] | max", "'x' | string | length", "v.list | tojson | length",
        "tools", "documents", "add_generation_prompt", "none", "True", "False", "None", "true", "v.e | tojson", "v.s | safe", "['a', none, 1.0] | join('|')",
    ]
    cases = [("[{{ " + expression + " }}]", data) for expression in expressions]
    cases += [(source, data) for source in (
        "a\n  {% if true %}\n  b\n  {% endif %}\nc\n", "a\n  {%- if true -%}\n  b\n  {%- endif %}\nc\n\n", "{# c #}\nx\n  {# d #}\ny", "  {%+ if true %}x{% endif +%}\n y", "x {{- ' y ' -}} z", "\n\nx\n", "x\r\ny\r\n{% if true %}\r\nz{% endif %}",
        "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }};{% endfor %}",
        "{% for i in [1,2,3] %}{{ loop.index }}/{{ loop.length }}/{{ loop.revindex }}/{{ loop.previtem }}/{{ loop.nextitem }} {% endfor %}", "{% for k, x in v.map.items() %}{{ k }}={{ x }};{% endfor %}", "{% for k in v.map %}{{ k }},{% endfor %}",
        "{% for i in [] %}x{% else %}empty{% endfor %}", "{% for i in v.list if i %}{{ i }},{% endfor %}", "{% for i in missing %}x{% endfor %}done", "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}", "{% set x %}block {{ v.i }}{% endset %}[{{ x }}]", "{% macro m(a, b='d') %}<{{ a }}{{ b }}>{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}", "{% macro r(n) %}{{ n }}{% if n > 0 %}{{ r(n - 1) }}{% endif %}{% endmacro %}{{ r(5) }}",
        "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}x{% endcall %}", "{% generation %}a{{ v.i }}{% endgeneration %}b", "x\n  {%- generation -%}\n  a\n  {%- endgeneration %}\nb", "{% set y = 1 %}{% generation %}{% set y = 2 %}{{ y }}{% endgeneration %}{{ y }}",
        "{% raw %}{{ x }}{% endraw %}", "{% filter upper %}ab{% endfilter %}", "{% with a = 1 %}{{ a }}{% endwith %}", "{% if v.nope %}a{% elif v.t %}b{% else %}c{% endif %}", "{{ '{{' }}{{ '%}' }}", "{% set a, b = [1, 2] %}{{ a }}{{ b }}", "{{ strftime_now('%Y') | length }}",
        "{%- for m in messages %}{{ m.role }}:{{ m.content }}{% if not loop.last %},{% endif %}{% endfor -%}  \n", "{% set c = v.list %}{% set _ = none %}{{ c | length }}", "{{ raise_exception('no') }}", "{{ v.nope.deep }}", "{{ v.s.nosuch() }}", "{{ nosuchfunction() }}", "{{ v.list.append(1) }}", "{{ 1 + 'a' }}", "{{ missing | tojson }}", "{{ 'a' | nosuchfilter }}",
    )]
    return cases

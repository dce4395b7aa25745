#!/usr/bin/env python3
"""Makes docs/benchmarks/gpu.md and its plots out of docs/benchmarks/gpu.json: the rows that have something to be compared with,
decode over the batch and prefill over the length.

usage: tests/gpu/report.py [--check]
  --check   writes nothing; exit code 1 when the files are not what the rows make
"""
import json
import math
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs/benchmarks"
ALSO = (r"serve Qwen3-VL-235B-A22B-FP8\.stages2\..*(decode|prefill|start_to_first_token)|serve .*\.soak\..*|serve .*(right|same_tokens_as_first_split)|load .*|"
        r"vision vision\.[^p].*(rate)|sampler sampler\.step\..*\.B(1|256)(\.host)?|sanitizer .*|(stage|sampler) check\..*")
COLOURS = {"ours": "#1f6feb", "peer": "#d1242f", "bound": "#8c959f"}


def number(value) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def plot(title: str, x_name: str, points: list[tuple[float, dict]]) -> str:
    """Lines of ours, peer and bound over x; both axes logarithmic, as the cases lie."""
    width, height, left, bottom = 560, 340, 70, 45
    xs = [x for x, _ in points]
    values = [row[key] for _, row in points for key in COLOURS if row.get(key)]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1
    x_low, x_high = math.log2(min(xs)), math.log2(max(xs)) if max(xs) > min(xs) else math.log2(min(xs)) + 1

    def place(x, y):
        return (left + (math.log2(x) - x_low) / (x_high - x_low) * (width - left - 30), height - bottom - (math.log10(y) - low) / (high - low) * (height - bottom - 40))

    out = [f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-family='sans-serif' font-size='11'>",
           f"<rect width='{width}' height='{height}' fill='white'/><text x='{left}' y='20' font-size='13'>{title}</text>"]
    for x in xs:
        px, _ = place(x, 10**low)
        out.append(f"<text x='{px:.0f}' y='{height - bottom + 16}' text-anchor='middle'>{x:g}</text>")
    out.append(f"<text x='{width / 2:.0f}' y='{height - 10}' text-anchor='middle'>{x_name}</text>")
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for mantissa in (1, 2, 5):
            y = mantissa * 10**exponent
            if not low <= math.log10(y) <= high:
                continue
            _, py = place(xs[0], y)
            out.append(f"<line x1='{left}' y1='{py:.0f}' x2='{width - 30}' y2='{py:.0f}' stroke='#eaeef2'/><text x='{left - 6}' y='{py + 4:.0f}' text-anchor='end'>{y:,.0f}</text>")
    for index, (key, colour) in enumerate(COLOURS.items()):
        line = [place(x, row[key]) for x, row in points if row.get(key)]
        out.append(f"<polyline fill='none' stroke='{colour}' stroke-width='2' points='{' '.join(f'{px:.0f},{py:.0f}' for px, py in line)}'/>")
        out += [f"<circle cx='{px:.0f}' cy='{py:.0f}' r='3' fill='{colour}'/>" for px, py in line]
        name = {"ours": "this project", "peer": "vLLM 0.26.0", "bound": "bound"}[key]
        out.append(f"<text x='{left + 10 + 110 * index}' y='36' fill='{colour}'>{name}</text>")
    return "".join(out) + "</svg>\n"


def series(rows: list[dict], pattern: str) -> list[tuple[float, dict]]:
    """Rows whose case fits, over the product of the pattern's groups."""
    found = [(math.prod(map(float, match.groups())), row) for row in rows if (match := re.fullmatch(pattern, row["case"]))]
    return sorted(found, key=lambda item: item[0])


def files() -> dict[str, str]:
    rows = json.loads((FOLDER / "gpu.json").read_text())
    compared = [row for row in rows if row.get("peer") or row.get("target")]
    lines = ["# On GPUs", "",
             "Written by `tests/gpu/report.py` from [gpu.json](gpu.json), which holds every figure with its GPU, date, commit and command (kernels too).",
             "The peer is vLLM 0.26.0 with the same shapes and random weights on the same kind of GPU; its figures are of its own engine, those of cases with `http` here are",
             "taken over HTTP. `bound`: the bytes that must move at copy bandwidth, or 600 TFLOP/s. [gpu-profile.md](gpu-profile.md) says where a step's time goes.", "",
             "| case | unit | ours | vLLM | ours / vLLM | target | reached | bound | GPUs | date |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in compared:
        ratio = f"{row['ours'] / row['peer']:.2f}" if row.get("peer") else ""
        reached = f"{row['ours'] / row['target']:.2f}" if row.get("target") else ""
        lines.append(f"| {row['case']} | {row['unit']} | {number(row['ours'])} | {number(row.get('peer'))} | {ratio} | {number(row.get('target'))} | {reached} | "
                     f"{number(row.get('bound'))} | {row['gpu']} | {row['date']} |")
    out = {}
    plots = [("gpu-decode-30b", "30B-A3B, bf16, one H200: decode, tokens/s", "sequences", series(rows, r"Qwen3-VL-30B-A3B\.decode\.B(\d+)\.context\d+")),
             ("gpu-decode-30b-fp8", "30B-A3B, block FP8, one H200: decode, tokens/s", "sequences", series(rows, r"Qwen3-VL-30B-A3B-FP8\.decode\.B(\d+)\.context\d+")),
             ("gpu-prefill-30b", "30B-A3B, bf16, one H200: prefill, tokens/s", "tokens of prompts of 2,048", series(rows, r"Qwen3-VL-30B-A3B\.prefill\.(\d+)x(\d+)")),
             ("gpu-decode-235b", "235B-A22B, bf16, four H200s: decode over HTTP, tokens/s", "clients", series(rows, r"Qwen3-VL-235B-A22B\.stages4\.http\.clients(\d+)\.in\d+\.out129\.decode"))]
    lines += ["", "And some of what has no peer:", "", "| suite | case | unit | ours | GPUs | date |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row not in compared and re.fullmatch(ALSO, f"{row['suite']} {row['case']}"):
            lines.append(f"| {row['suite']} | {row['case']} | {row['unit']} | {number(row['ours'])} | {row['gpu']} | {row['date']} |")
    lines.append("")
    for name, title, x_name, points in plots:
        if len(points) > 1:
            out[name + ".svg"] = plot(title, x_name, points)
            lines.append(f"![{title}]({name}.svg)")
    out["gpu.md"] = "\n".join(lines) + "\n"
    return out


def main() -> int:
    made = files()
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in made.items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text]
        if stale:
            print(f"not what gpu.json makes: {', '.join(stale)} (tests/gpu/report.py writes them)")
        return 1 if stale else 0
    for name, text in made.items():
        (FOLDER / name).write_text(text)
    print(f"{len(made)} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

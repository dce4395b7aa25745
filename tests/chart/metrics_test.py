#!/usr/bin/env python3
"""Panels and alerts against what really is exported: the digits pipeline is started by qwenctl, asked about a picture, and its head
and stages are scraped before and after; the operator's registry comes from a program that links it.

  metrics_test.py QWENCTL KUBE_METRICS

1. Every metric, label, label value and bucket bound that a panel or an alert names is in a scrape.
2. Every panel shows something: promtool evaluates its expression over the two scrapes, labelled as the chart's PodMonitor labels
   them. An expression that joins series which never match, or takes a rate of a gauge that is not there, is empty and fails.
"""
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import yaml

from helm_chart import CHART, ROOT, Checks, run, tool
from promql import expressions, selectors

sys.path.insert(0, str(ROOT / "tests/parity"))
from served import Pipeline  # noqa: E402

# What a scrape adds: Prometheus itself, its operator's PodMonitor, and the chart's relabelling (templates/podmonitors.yaml).
SCRAPED = {"job": "operators/demo-qwen-pipeline-pipelines", "namespace": "team-a"}
PIPELINE = {**SCRAPED, "pipeline": "digits", "replica": "0"}
LATER = 10  # intervals between the first scrape and the second, and from there to the end


def children(pid):
    """Process ids below `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[1] == str(pid):
                found.append(int(stat.parent.name))
        except OSError:
            pass  # it has ended
    return found


def targets(pipeline):
    """{pod: address of its /metrics}"""
    found = {"head": pipeline.url + "/metrics"}
    for pid in children(pipeline.process.pid):
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "--index" in arguments and "--metrics-port" in arguments:
            port = arguments[arguments.index("--metrics-port") + 1]
            found["stage-" + arguments[arguments.index("--index") + 1]] = f"http://127.0.0.1:{port}/metrics"
    return found


def samples(text):
    """{(metric, ((label, value), ...)): value} of the Prometheus text format."""
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r'([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?', line)
        if match and not line.startswith("#"):
            labels = tuple(sorted(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match.group(2) or "")))
            found[(match.group(1), labels)] = match.group(3)
    return found


def scrape(addresses):
    return {pod: samples(urllib.request.urlopen(url, timeout=20).read().decode()) for pod, url in addresses.items()}


def ask(pipeline, picture):
    image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    body = {"model": "digits", "max_tokens": 8, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Which digit is this?"}]}]}
    request = urllib.request.Request(pipeline.url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]["message"]["content"]


def series(before, after, added):
    """promtool's input_series of one target. A series that is not there before is absent there too."""
    result = []
    for (metric, labels), value in after.items():
        first = before.get((metric, labels))
        head = f"{first}x{LATER - 1}" if first is not None else f"_x{LATER - 1}"
        text = ", ".join(f'{k}="{v}"' for k, v in [*labels, *added.items()])
        result.append({"series": f"{metric}{{{text}}}", "values": f"{head} {value}x{LATER}"})
    return result


def check_names(checks, where, text, exported):
    """`exported`: {metric: [labels of each series]}, scrape labels included."""
    found, groups = selectors(text)
    known = set()
    for metric, matchers in found:
        if not checks.that(f"{where}: {metric} is exported", metric in exported):
            continue
        known |= {label for labels in exported[metric] for label in labels}
        for label, (op, value) in matchers.items():
            matching = [labels for labels in exported[metric] if label in labels and
                        (labels[label] == value if op == "=" else re.fullmatch(value, labels[label]))]
            optional = metric == "qwen_http_responses_total" and label == "code"  # a code appears with its first response
            if op in ("=", "=~") and not matching and not (optional and any(label in labels for labels in exported[metric])):
                checks.that(f"{where}: {metric} has {label}{op}{value!r}", False, exported[metric][:3])
    unknown = groups - known
    checks.that(f"{where}: groups by labels that are there", not unknown, unknown)


def main():
    qwenctl, kube_metrics = sys.argv[1:3]
    checks = Checks()
    operator = samples(subprocess.run([kube_metrics], capture_output=True, text=True, check=True, timeout=30).stdout)
    examples = ROOT / "docs/examples"
    with Pipeline(qwenctl, examples / "digits.yaml") as pipeline:
        addresses = targets(pipeline)
        checks.that("a head and four stages are scraped", sorted(addresses) == ["head", *(f"stage-{k}" for k in range(4))], addresses)
        before = scrape(addresses)
        answer = ask(pipeline, examples / "digits/0006-six.png")
        checks.that("the pipeline answers", "six" in answer.lower() or "6" in answer, answer)
        after = scrape(addresses)

    exported = {}
    for pod, found in {**after, "operator": operator}.items():
        added = {**(SCRAPED if pod == "operator" else PIPELINE), "pod": pod}
        for metric, labels in found:
            exported.setdefault(metric, []).append({**dict(labels), **added})
    dashboard = json.loads((CHART / "dashboards/stage-latency.json").read_text())
    rules = yaml.safe_load((CHART / "alerts/rules.yaml").read_text())
    panels = expressions(dashboard)
    alerts = [(r["alert"], r["expr"]) for g in rules["groups"] for r in g["rules"]]
    for where, text in panels + alerts:
        check_names(checks, where, text, exported)
    unseen = {m for m in exported if m.startswith("qwen_")} - {m for _, text in panels + alerts for m, _ in selectors(text)[0]}
    unseen = {m for m in unseen if not re.search(r"_(bucket|sum|count)$", m)}
    checks.that("every qwen_ metric is shown somewhere", not unseen, unseen)

    inputs = [s for pod in after for s in series(before[pod], after[pod], {**PIPELINE, "pod": pod})]
    inputs += series(operator, {k: str(float(v) + 1) for k, v in operator.items()}, {**SCRAPED, "pod": "operator"})
    # What one question cannot bring about; an epoch that never changed is no annotation, and that is right.
    cases = [{"expr": f"count({text}) > bool 0", "eval_time": f"{LATER * 15 + 60}s", "exp_samples": [{"labels": "{}", "value": 1}]}
             for title, text in panels if title != "New epoch"]
    with tempfile.TemporaryDirectory(prefix="panels.") as folder:
        path = Path(folder) / "panels_test.yaml"
        path.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s",
                                        "tests": [{"interval": "15s", "input_series": inputs, "promql_expr_test": cases}]}))
        status, out, err = run(tool("promtool"), "test", "rules", path)
        checks.that(f"all {len(cases)} expressions of the panels show something", status == 0, out + err)
    return checks.end()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())

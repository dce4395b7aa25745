#!/usr/bin/env python3
"""The chart without a cluster: lint, what it renders for several values against golden files, what its schema refuses, its CRD,
its alerts (promtool), its dashboard, and docs/crd.md.

  templates_test.py            --update rewrites golden/ and docs/crd.md from what is rendered: read the difference before it is committed
"""
import copy
import difflib
import json
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

import crd_reference
from helm_chart import CHART, CRD, MONITORING, Checks, documents, helm, run, template, tool
from promql import expressions

GOLDEN = Path(__file__).parent / "golden"
DIGEST = "sha256:" + "0123456789abcdef" * 4

ALL_MONITORING = {"monitoring": {"podMonitors": {"enabled": True, "labels": {"release": "prometheus"}}, "rules": {"enabled": True},
                                 "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Models"}}}}
TUNED = {
    "fullnameOverride": "qwen",
    "images": {"controller": {"repository": "registry.example.com:5000/qwen/controller", "digest": DIGEST},
               "head": {"repository": "registry.example.com:5000/qwen/head", "tag": "1.2.3"},
               "stage": {"repository": "registry.example.com:5000/qwen/stage", "tag": "1.2.3-cuda"},
               "pullPolicy": "Always", "pullSecrets": ["registry"]},
    "controller": {"replicas": 3, "logLevel": "debug", "logFormat": "text", "port": 9090, "resources": {"limits": {"memory": "64Mi"}},
                   "nodeSelector": {"role": "system"}, "tolerations": [{"key": "system", "operator": "Exists"}], "priorityClassName": "high",
                   "podAnnotations": {"a": "b"}, "podLabels": {"c": "d"}, "terminationGracePeriodSeconds": 30,
                   "affinity": {"nodeAffinity": {}}},
    "serviceAccount": {"name": "operator", "annotations": {"e": "f"}},
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
                      "apiServerPorts": [6443], "apiServerCidrs": ["10.0.0.1/32"]},
    "crds": {"keep": False}, "rbac": {"aggregate": False},
}
OFF = {"crds": {"install": False}, "rbac": {"create": False}, "serviceAccount": {"create": False, "name": "theirs"},
       "podDisruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False}}
VARIANTS = {  # name: (values, API groups of the cluster)
    "default": ({}, ()),
    "one-namespace": ({"watchNamespace": "team-a"}, ()),
    "monitoring": (ALL_MONITORING, (MONITORING,)),
    "tuned": (TUNED, ()),
    "off": (OFF, ()),
}
REFUSED = [  # (what, values, what the refusal must name)
    ("a misspelt value", {"watchNamespaces": "a"}, r"watchNamespaces"),
    ("a misspelt nested value", {"controller": {"replica": 2}}, r"/controller.*replica"),
    ("replicas as text", {"controller": {"replicas": "2"}}, r"/controller/replicas"),
    ("six replicas", {"controller": {"replicas": 6}}, r"/controller/replicas"),
    ("a privileged port", {"controller": {"port": 80}}, r"/controller/port"),
    ("an unknown log level", {"controller": {"logLevel": "loud"}}, r"/controller/logLevel"),
    ("an unknown log format", {"controller": {"logFormat": "xml"}}, r"/controller/logFormat"),
    ("a digest that is none", {"images": {"head": {"digest": "sha256:12"}}}, r"/images/head/digest"),
    ("a tag with a space", {"images": {"head": {"tag": "a b"}}}, r"/images/head/tag"),
    ("an image without a repository", {"images": {"stage": {"repository": ""}}}, r"/images/stage/repository"),
    ("an unknown pull policy", {"images": {"pullPolicy": "Sometimes"}}, r"/images/pullPolicy"),
    ("a namespace in capitals", {"watchNamespace": "Team"}, r"/watchNamespace"),
    ("a name that is too long for its suffixes", {"fullnameOverride": "q" * 53}, r"/fullnameOverride"),
    ("a CIDR without a length", {"networkPolicy": {"apiServerCidrs": ["10.0.0.1"]}}, r"/networkPolicy/apiServerCidrs/0"),
    ("no port of the API server", {"networkPolicy": {"apiServerPorts": []}}, r"/networkPolicy/apiServerPorts"),
    ("an interval without a unit", {"monitoring": {"podMonitors": {"interval": "15"}}}, r"/monitoring/podMonitors/interval"),
    ("a flag as text", {"crds": {"install": "yes"}}, r"/crds/install"),
]


def without_large_files(text):
    """What a golden file holds: all but the CRD and the dashboard, which have files of their own."""
    kept = [d for d in re.split(r"^---\n", text, flags=re.M) if d.strip() and "kind: CustomResourceDefinition" not in d and "-dashboard\n" not in d]
    return "---\n" + "---\n".join(kept)


def check_golden(checks, name, text, update):
    path = GOLDEN / f"{name}.yaml"
    text = without_large_files(text)
    if update:
        path.write_text(text)
    expected = path.read_text() if path.exists() else ""
    difference = "".join(difflib.unified_diff(expected.splitlines(True), text.splitlines(True), str(path), "rendered"))
    checks.that(f"{name}: renders golden/{name}.yaml", not difference, difference)


def check_invariants(checks, name, objects):
    """What must hold for whatever values."""
    clusterwide = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}
    names = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    checks.that(f"{name}: no object twice", len(set(names)) == len(names), names)
    checks.that(f"{name}: namespaced objects say where they are", all(bool(ns) == (kind not in clusterwide) for kind, ns, _ in names), names)
    checks.that(f"{name}: every object carries the standard labels",
                all({"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/version", "helm.sh/chart"} <= set(o["metadata"]["labels"])
                    for o in objects))
    rules = [r for o in objects if o["kind"] in ("Role", "ClusterRole") for r in o["rules"]]
    checks.that(f"{name}: no right is a wildcard", not any("*" in r[field] for r in rules for field in ("apiGroups", "resources", "verbs")))
    secrets = {v for r in rules if "secrets" in r["resources"] for v in r["verbs"]}
    checks.that(f"{name}: nobody changes or deletes a secret", secrets <= {"list", "watch", "create"}, secrets)

    deployment = next(o for o in objects if o["kind"] == "Deployment")
    pod = deployment["spec"]["template"]
    container, = pod["spec"]["containers"]
    own = container["securityContext"]
    checks.that(f"{name}: its pod is locked down", own["readOnlyRootFilesystem"] and own["allowPrivilegeEscalation"] is False
                and own["capabilities"] == {"drop": ["ALL"]} and pod["spec"]["securityContext"]["runAsNonRoot"]
                and pod["spec"]["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault")
    checks.that(f"{name}: probes answer on the port that is opened",
                {container[p]["httpGet"]["port"] for p in ("startupProbe", "livenessProbe", "readinessProbe")} == {container["ports"][0]["name"]}
                and f"--metrics-port={container['ports'][0]['containerPort']}" in container["args"])
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    selectors += [o["spec"]["selector"]["matchLabels"] for o in objects if o["kind"] == "PodDisruptionBudget"]
    selectors += [o["spec"]["podSelector"]["matchLabels"] for o in objects if o["kind"] == "NetworkPolicy"]
    selectors += [c["labelSelector"]["matchLabels"] for c in pod["spec"]["topologySpreadConstraints"]]
    checks.that(f"{name}: every selector finds the pod", all(s.items() <= pod["metadata"]["labels"].items() for s in selectors), selectors)
    checks.that(f"{name}: no image without a version", all(re.search(r"(:[^/]+|@sha256:\w+)$", image) and not image.endswith(":latest")
                for image in [container["image"]] + [a.split("=", 1)[1] for a in container["args"] if "--image-" in a]))


def check_crd(checks, rendered):
    crd = next(d for d in rendered["default"] if d["kind"] == "CustomResourceDefinition")
    source = yaml.safe_load(CRD.read_text())
    checks.that("the CRD of the chart is crds/qwenpipeline.yaml", crd["spec"] == source["spec"] and crd["metadata"]["name"] == source["metadata"]["name"])
    checks.that("and outlives the release", crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"})
    tuned = next(d for d in rendered["tuned"] if d["kind"] == "CustomResourceDefinition")
    checks.that("unless the values say otherwise", "annotations" not in tuned["metadata"])
    checks.that("or is not there at all", not any(d["kind"] == "CustomResourceDefinition" for d in rendered["off"]))
    with tempfile.TemporaryDirectory(prefix="chart.") as folder:  # what people get is the archive, not the working tree
        status, _, err = helm("package", CHART, "--destination", folder)
        archive, = Path(folder).glob("*.tgz")
        shutil.unpack_archive(archive, folder)
        packed = Path(folder) / "qwen-pipeline/files/qwenpipeline.yaml"
        checks.that("the packed chart holds it as a file", status == 0 and not packed.is_symlink() and packed.read_text() == CRD.read_text(), err)
        changed = Path(folder) / "qwen-pipeline"
        packed.write_text(CRD.read_text().replace("\nmetadata:\n", "\nmetadata:\n  annotations: {}\n"))
        status, _, err = helm("template", "x", changed)
        checks.that("a CRD whose metadata the template does not know is refused", status != 0 and "its metadata is not the name alone" in err, err)


def check_reference(checks, update):
    """docs/crd.md is what the CRD says, and every field of a spec says what it is."""
    text = crd_reference.text()
    if update:
        crd_reference.DOCUMENT.write_text(text)
    found = crd_reference.DOCUMENT.read_text() if crd_reference.DOCUMENT.exists() else ""
    difference = "".join(difflib.unified_diff(found.splitlines(True), text.splitlines(True), str(crd_reference.DOCUMENT), "the CRD"))
    checks.that("docs/crd.md is made from crds/qwenpipeline.yaml", not difference, difference)


def check_alerts(checks, rendered):
    rules = yaml.safe_load((CHART / "alerts/rules.yaml").read_text())
    made = next(d for d in rendered["monitoring"] if d["kind"] == "PrometheusRule")
    checks.that("the PrometheusRule is alerts/rules.yaml", made["spec"] == rules)
    alerts = [r for g in rules["groups"] for r in g["rules"]]
    checks.that("every alert has a severity, a summary and a page to read",
                all(r["labels"]["severity"] in ("critical", "warning") and {"summary", "runbook"} <= set(r["annotations"]) for r in alerts))
    operations = (CHART.parents[1] / "docs/operations.md").read_text()
    for title in sorted({re.fullmatch(r'docs/operations\.md, "(.+)"', r["annotations"]["runbook"]).group(1) for r in alerts}):
        checks.that(f"docs/operations.md has the section {title!r}", f"## {title}\n" in operations)
    with tempfile.TemporaryDirectory(prefix="rules.") as folder:
        test = Path(folder) / "rules_test.yaml"
        shutil.copy(CHART / "alerts/rules.yaml", Path(folder) / "rules.yaml")
        shutil.copy(Path(__file__).parent / "rules_test.yaml", test)
        status, out, err = run(tool("promtool"), "check", "rules", Path(folder) / "rules.yaml")
        checks.that("promtool accepts the alerts", status == 0, out + err)
        status, out, err = run(tool("promtool"), "test", "rules", test)
        checks.that("each alert fires on its trouble and is silent beside it", status == 0, out + err)
        tested = {t["alertname"] for case in yaml.safe_load(test.read_text())["tests"] for t in case["alert_rule_test"] if t["exp_alerts"]}
        checks.that("and none is without such a test", tested == {r["alert"] for r in alerts}, tested ^ {r["alert"] for r in alerts})


def check_dashboard(checks, rendered):
    text = (CHART / "dashboards/stage-latency.json").read_text()
    dashboard = json.loads(text)
    config = next(d for d in rendered["monitoring"] if d["kind"] == "ConfigMap")
    checks.that("the ConfigMap holds the dashboard", json.loads(config["data"]["qwen-stage-latency.json"]) == dashboard)
    checks.that("where Grafana's sidecar looks", config["metadata"]["labels"]["grafana_dashboard"] == "1")
    panels = [p for p in dashboard["panels"] if p["type"] != "row"]
    checks.that("panel ids are unique", len({p["id"] for p in dashboard["panels"]}) == len(dashboard["panels"]))
    checks.that("every panel says what it shows", all(p["title"] and p["description"] for p in panels), [p["title"] for p in panels if not p["description"]])
    checks.that("every panel takes the data source that is chosen", all(t["datasource"]["uid"] == "${datasource}" for p in panels for t in [p, *p["targets"]]))
    cells = [(x, y) for p in dashboard["panels"] for g in [p["gridPos"]] for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
    checks.that("no panel covers another", len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24)
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    used = {v for p in panels for t in p["targets"] for v in re.findall(r"\$(\w+)", t["expr"])} - {"__rate_interval"}
    checks.that("every variable exists", used <= variables, used - variables)
    with tempfile.TemporaryDirectory(prefix="panels.") as folder:  # promtool parses rules, so every expression becomes one
        rules = [{"record": f"panel:{n}", "expr": e} for n, (_, e) in enumerate(expressions(dashboard))]
        path = Path(folder) / "panels.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        status, out, err = run(tool("promtool"), "check", "rules", path)
        checks.that(f"promtool parses the {len(rules)} expressions of its panels", status == 0, out + err)


def check_documents(checks):
    """`helm upgrade --install NAME CHART ...` as the documents say it, rendered: its values exist, and what it is about comes out."""
    for path in sorted((CHART.parents[1] / "docs").glob("*.md")):
        text = path.read_text().replace("\\\n", " ")
        for command in re.findall(r"^helm upgrade --install (.+)$", text, re.M):
            words = [w for w in shlex.split(command) if w not in ("--create-namespace", "--reuse-values")]
            words[1] = str(CHART.parents[1] / words[1])
            status, out, err = helm("template", *words, "--api-versions", MONITORING)
            kinds = {d["kind"] for d in documents(out)} if status == 0 else set()
            wanted = {"Deployment"} | ({"PodMonitor", "PrometheusRule", "ConfigMap"} if "monitoring" in command else set())
            checks.that(f"{path.name}: helm upgrade --install {command[:60]}...", wanted <= kinds, err or kinds)
            yield path.name


def main():
    checks, rendered = Checks(), {}
    status, out, err = helm("lint", "--strict", CHART)
    checks.that("helm lint is content", status == 0, out + err)
    for name, (values, apis) in VARIANTS.items():
        status, text = template(values, apis=apis)
        if not checks.that(f"{name}: renders", status == 0, text):
            continue
        rendered[name] = documents(text)
        check_golden(checks, name, text, "--update" in sys.argv[1:])
        check_invariants(checks, name, rendered[name])
    for what, values, pattern in REFUSED:
        status, text = template(values)
        checks.that(f"the schema refuses {what}", status != 0 and re.search(pattern, text.replace("'", "")), text)

    status, text = template(ALL_MONITORING)
    kinds = {d["kind"] for d in documents(text)}
    checks.that("without the Prometheus operator there are no objects of its own", status == 0 and not kinds & {"PodMonitor", "PrometheusRule"}, kinds)
    checks.that("but the dashboard is there", "ConfigMap" in kinds)
    values = copy.deepcopy(TUNED) | {"fullnameOverride": "q" * 52}
    names = [d["metadata"]["name"] for d in documents(template(values)[1])]
    checks.that("the longest name fits with every suffix", max(map(len, names)) <= 63, names)
    long_release = [d["metadata"]["name"] for d in documents(template({}, release="r" * 53)[1])]
    checks.that("so does the longest release name", max(len(n) for n in long_release) <= 63, long_release)

    check_crd(checks, rendered)
    check_reference(checks, "--update" in sys.argv[1:])
    check_alerts(checks, rendered)
    check_dashboard(checks, rendered)
    checks.that("docs/install.md installs and watches", list(check_documents(checks)).count("install.md") == 2)
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The chart in a real API server (tests/cluster): installed, upgraded with another CRD, uninstalled, installed again; what its
ServiceAccount may do, verb by verb over every resource that the server knows; its pod under the restricted Pod Security Standard; and
the operator itself, started with the Deployment's arguments and a token of its ServiceAccount, at work with no other right than those.
No node and no controller manager runs, so nothing waits for pods.

  install_test.py [QWEN_CONTROLLER]
"""
import concurrent.futures
import copy
import http.client
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from helm_chart import CHART, CRD, MONITORING, ROOT, Checks, helm

sys.path.insert(0, str(ROOT / "tests/cluster"))
import cluster as kube  # noqa: E402

VERBS = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]
OWNED = {"get", "list", "watch", "create", "patch", "delete"}
# All that the operator may do in a namespace of pipelines: informers (list, watch), server-side apply (patch; create when the object is
# new), deletion of what it made. (group, resource): verbs
OPERATES = {
    ("qwenpipeline.dev", "qwenpipelines"): {"get", "list", "watch", "patch"},
    ("qwenpipeline.dev", "qwenpipelines/status"): {"patch"},
    ("qwenpipeline.dev", "qwenpipelines/finalizers"): {"update"},
    ("", "pods"): {"get", "list", "watch", "create", "delete"},
    ("", "services"): {"get", "list", "watch", "create", "patch"},
    ("", "secrets"): {"list", "watch", "create"},
    ("", "persistentvolumeclaims"): {"list", "watch", "create"},
    ("batch", "jobs"): {"list", "watch", "create"},
    ("scheduling.x-k8s.io", "podgroups"): {"create", "patch"},
    ("scheduling.volcano.sh", "podgroups"): {"create", "patch"},
    ("", "nodes"): {"get", "list", "watch"},
    ("networking.k8s.io", "networkpolicies"): OWNED,
    ("policy", "poddisruptionbudgets"): OWNED,
    ("events.k8s.io", "events"): {"create", "patch"},
}
# What the API server gives to everybody who is known to it.
EVERYBODY = {("authentication.k8s.io", "selfsubjectreviews"), ("authorization.k8s.io", "selfsubjectaccessreviews"),
             ("authorization.k8s.io", "selfsubjectrulesreviews")}
LEASE = ("coordination.k8s.io", "leases")
MONITORING_CRDS = [{
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": f"{plural}.monitoring.coreos.com"},
    "spec": {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
             "versions": [{"name": "v1", "served": True, "storage": True,
                           "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}}]}}
    for kind, plural in [("PodMonitor", "podmonitors"), ("PrometheusRule", "prometheusrules")]]


class Server:
    """The API as cluster-admin, over one connection per thread: a thousand reviews take a second."""

    def __init__(self, cluster):
        self.config = str(cluster.dir / "admin.kubeconfig")
        self.host = cluster.server.removeprefix("https://")
        self.tls = ssl.create_default_context(cafile=cluster.pki / "ca.crt")
        self.tls.load_cert_chain(cluster.pki / "admin.crt", cluster.pki / "admin.key")

    def connect(self):
        return http.client.HTTPSConnection(self.host, context=self.tls, timeout=20)

    def call(self, method, path, body=None, connection=None, headers=None, retries=20):
        connection = connection or self.connect()
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        status, body_back = answer.status, json.loads(answer.read())
        if status == 429 and retries:  # a CRD's storage is made with its first request
            time.sleep(0.5)
            return self.call(method, path, body, connection, headers, retries - 1)
        return status, body_back

    def kubectl(self, *arguments, stdin=None):
        done = subprocess.run([kube.binaries() / "kubectl", "--kubeconfig", self.config, *arguments], input=stdin, capture_output=True, text=True,
                              timeout=60)
        return done.returncode, done.stdout + done.stderr

    def apply(self, *objects, arguments=()):
        return self.kubectl("apply", *arguments, "-f", "-", stdin="---\n".join(yaml.safe_dump(o) for o in objects))

    def exists(self, *arguments):
        return self.kubectl("get", *arguments)[0] == 0

    def resources(self):
        """{(group, resource)} that the server knows, subresources too."""
        found = set()
        groups = [("", "/api/v1")]
        groups += [(g["name"], "/apis/" + v["groupVersion"]) for g in self.call("GET", "/apis")[1]["groups"] for v in g["versions"]]
        for group, path in groups:
            found |= {(group, r["name"]) for r in self.call("GET", path)[1]["resources"]}
        return found | set(OPERATES)  # the finalizers subresource is in no list

    def allowed(self, account, namespace, resources, name=""):
        """{(group, resource): {verbs}} that the service account "namespace:name" may do."""
        home = account.split(":")[0]
        user = {"user": f"system:serviceaccount:{account}", "groups": ["system:serviceaccounts", f"system:serviceaccounts:{home}", "system:authenticated"]}

        def of(part):
            connection, found = self.connect(), {}
            for group, resource in part:
                plain, _, sub = resource.partition("/")
                for verb in VERBS:
                    about = {"namespace": namespace, "group": group, "resource": plain, "subresource": sub, "verb": verb, "name": name}
                    _, answer = self.call("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews",
                                          {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {**user, "resourceAttributes": about}},
                                          connection)
                    if answer["status"]["allowed"]:
                        found.setdefault((group, resource), set()).add(verb)
            return found
        ordered = sorted(resources)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(of, [ordered[k::4] for k in range(4)]))
        return {key: verbs for part in parts for key, verbs in part.items() if key not in EVERYBODY}


def difference(found, expected):
    return {key: f"{sorted(found.get(key, []))} for {sorted(expected.get(key, []))}" for key in {*found, *expected}
            if found.get(key, set()) != expected.get(key, set())}


def check_install(checks, server, install):
    checks.that("namespaces that enforce the restricted standard", server.apply(*[
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
        for name in ("operators", "team-a", "team-b")])[0] == 0)
    status, text = install("operators", "demo", CHART, ["--dry-run=server"])
    checks.that("a dry run on the server is content", status == 0, text)
    checks.that("and makes nothing", not server.exists("-n", "operators", "deployment", "demo-qwen-pipeline"))
    status, text = install("operators", "demo", CHART)
    checks.that("installs", status == 0, text)
    checks.that("without a warning of the API server", "Warning" not in text and "warning" not in text, text)
    for kind in ("deployment", "serviceaccount", "poddisruptionbudget", "networkpolicy"):
        checks.that(f"made the {kind}", server.exists("-n", "operators", kind, "demo-qwen-pipeline"))
    status, text = server.kubectl("wait", '--for=jsonpath={.status.conditions[?(@.type=="Established")].status}=True', "--timeout=20s", "crd/qwenpipelines.qwenpipeline.dev")
    checks.that("made the CRD", status == 0, text)


def check_pod(checks, server):
    _, deployment = server.call("GET", "/apis/apps/v1/namespaces/operators/deployments/demo-qwen-pipeline")
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": template["metadata"]["labels"]}, "spec": template["spec"]}
    dry = "/api/v1/namespaces/operators/pods?dryRun=All"
    status, answer = server.call("POST", dry, pod)
    checks.that("its pod is admitted where the restricted standard is enforced", status == 201, answer.get("message"))
    token = [v for v in answer["spec"]["volumes"] if "projected" in v]
    checks.that("with a bound token", len(token) == 1, answer["spec"]["volumes"])
    worse = copy.deepcopy(pod)
    del worse["spec"]["containers"][0]["securityContext"]
    status, answer = server.call("POST", dry, worse)
    checks.that("without its securityContext it would not be", status == 403 and "restricted" in answer["message"], answer)


def check_rights(checks, server):
    resources = server.resources()
    checks.that("the server's resources are known", {("", "pods/exec"), ("apps", "deployments"), ("qwenpipeline.dev", "qwenpipelines/scale")} <= resources)
    own = "operators:demo-qwen-pipeline"
    found = server.allowed(own, "team-a", resources)
    wrong = difference(found, OPERATES)
    checks.that(f"over {len(resources)} resources the operator may do exactly what it needs", not wrong, wrong)
    wrong = difference(server.allowed(own, "operators", {LEASE}, "qwen-controller"), {LEASE: {"get", "create", "update"}})
    checks.that("and hold its own lease", not wrong, wrong)
    wrong = difference(server.allowed(own, "operators", {LEASE}, "another"), {LEASE: {"create"}})
    checks.that("but no other", not wrong, wrong)
    wrong = difference(server.allowed("operators:default", "team-a", {key for key in resources if key[0] != ""}), {})
    checks.that("which nobody else got with it", not wrong, wrong)

    as_operator = {"Impersonate-User": f"system:serviceaccount:{own}"}
    for method, path, status in [("GET", "/api/v1/namespaces/team-a/pods", 200), ("GET", "/api/v1/namespaces/team-a/secrets/x", 403),
                                 ("GET", "/api/v1/nodes", 200),
                                 ("PATCH", "/api/v1/nodes/n", 403), ("GET", "/apis/qwenpipeline.dev/v1alpha1/qwenpipelines", 200),
                                 ("DELETE", "/apis/qwenpipeline.dev/v1alpha1/namespaces/team-a/qwenpipelines/digits", 403),
                                 ("DELETE", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev", 403)]:
        got, answer = server.call(method, path, headers=as_operator)
        checks.that(f"{method} {path} as the operator is answered {status}", got == status, answer.get("message"))


def check_operator(checks, server, program, folder):
    """qwen-controller as its pod would run it: whatever right or flag is missing or misspelt shows here."""
    _, token = server.kubectl("create", "token", "demo-qwen-pipeline", "-n", "operators")
    config = yaml.safe_load(Path(server.config).read_text())
    config["users"][0]["user"] = {"token": token.strip()}
    config["contexts"][0]["context"]["namespace"] = "operators"  # in a pod: the ServiceAccount's
    (Path(folder) / "operator.kubeconfig").write_text(yaml.safe_dump(config))
    _, deployment = server.call("GET", "/apis/apps/v1/namespaces/operators/deployments/demo-qwen-pipeline")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    port, = kube.free_ports(1)
    arguments = [f"--metrics-port={port}" if a.startswith("--metrics-port=") else a for a in container["args"]]
    server.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "team-a"}})  # the controller manager's task
    log = Path(folder) / "operator.log"
    with log.open("w") as out:
        process = subprocess.Popen([program, *arguments, "--kubeconfig", str(Path(folder) / "operator.kubeconfig")], stdout=out, stderr=out,
                                   env={**os.environ, "QWEN_POD_NAME": "operator-0"})

    def until(ready, seconds=30):
        for _ in range(seconds * 5):
            if process.poll() is not None:
                return False
            if ready():
                return True
            time.sleep(0.2)
        return False

    def answers(probe):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", container[probe]["httpGet"]["path"])
            return connection.getresponse().status == 200
        except OSError:
            return False
    try:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            checks.that(f"the operator answers its {probe}", until(lambda: answers(probe)), log.read_text()[-2000:])
        pipeline = {"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": "p", "namespace": "team-a"},
                    "spec": {"model": {"id": "m", "source": {"persistentVolumeClaim": {"claimName": "weights"}}}, "stages": {"count": 2}}}
        status, text = server.apply(pipeline)
        checks.that("takes a pipeline", status == 0, text)
        pods = "/api/v1/namespaces/team-a/pods?labelSelector=qwenpipeline.dev/pipeline%3Dp"
        made = until(lambda: len(server.call("GET", pods)[1]["items"]) == 3)
        items = server.call("GET", pods)[1]["items"]
        checks.that("makes a head and two stages where the restricted standard is enforced", made, log.read_text()[-2000:])
        ports = {p["name"] for i in items for p in i["spec"]["containers"][0]["ports"]}
        checks.that("with the ports that the PodMonitor scrapes", {"api", "metrics"} <= ports, ports)
        images = {i["spec"]["containers"][0]["image"] for i in items}
        checks.that("of the images that the chart says", images == {"localhost/qwen-head:0.1.0", "localhost/qwen-stage:0.1.0"}, images)
        path = "/apis/qwenpipeline.dev/v1alpha1/namespaces/team-a/qwenpipelines/p"
        checks.that("says so in the status", until(lambda: server.call("GET", path)[1].get("status", {}).get("conditions")), log.read_text()[-2000:])
        events = "/apis/events.k8s.io/v1/namespaces/team-a/events"
        checks.that("and in events", until(lambda: server.call("GET", events)[1]["items"]), log.read_text()[-2000:])
        holder = server.call("GET", "/apis/coordination.k8s.io/v1/namespaces/operators/leases/qwen-controller")[1].get("spec", {}).get("holderIdentity", "")
        checks.that("holds the lease by its pod's name", holder.startswith("operator-0"), holder)
        first = items[0]["metadata"]["name"] if items else ""
        server.call("DELETE", f"/api/v1/namespaces/team-a/pods/{first}", {"gracePeriodSeconds": 0})
        checks.that("replaces a pod that is lost", until(lambda: len([i for i in server.call("GET", pods)[1]["items"] if i["metadata"]["name"] != first
                                                                     and not i["metadata"].get("deletionTimestamp")]) == 3), log.read_text()[-2000:])
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    text = log.read_text()
    checks.that("was never forbidden anything", "orbidden" not in text and "403" not in text, [l for l in text.splitlines() if "orbidden" in l or "403" in l][:5])
    checks.that("ends when it is told to", process.returncode == 0, text[-2000:])
    lease = server.call("GET", "/apis/coordination.k8s.io/v1/namespaces/operators/leases/qwen-controller")[1]["spec"]
    checks.that("and gives the lease back", not lease.get("holderIdentity"), lease)


def check_documents(checks, server):
    """Every YAML block of the documents about clusters is taken by a server that has the chart."""
    blocks = [(name, block) for name in ("install.md", "security.md") for block in re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.M | re.S)]
    for name, block in blocks:
        status, text = server.kubectl("apply", "--dry-run=server", "--validate=strict", "-n", "team-a", "-f", "-", stdin=block)
        checks.that(f"takes what docs/{name} says: {', '.join(d['kind'] for d in yaml.safe_load_all(block))}", status == 0 and "Warning" not in text, text)
    checks.that("in all four objects", sum(len(list(yaml.safe_load_all(block))) for _, block in blocks) == 4)


def check_upgrade(checks, server, install, folder):
    """Another version of the CRD comes with an upgrade; `helm upgrade` of a chart with crds/ would leave the old one."""
    status, text = server.kubectl("apply", "-n", "team-a", "-f", str(ROOT / "docs/examples/digits.yaml"))
    checks.that("takes docs/examples/digits.yaml", status == 0, text)
    newer = Path(folder) / "newer"
    shutil.copytree(CHART, newer)  # copies what the link points to
    text = CRD.read_text()
    (newer / "files/qwenpipeline.yaml").write_text(text.replace("                replicas:\n", "                addedLater: {type: string, default: new}\n"
                                                                "                replicas:\n", 1))
    checks.that("the newer CRD differs", (newer / "files/qwenpipeline.yaml").read_text() != text)
    path = "/apis/qwenpipeline.dev/v1alpha1/namespaces/team-a/qwenpipelines/digits"

    def spec_when(ready):  # a changed schema reaches the server's handlers a moment after it is stored
        for _ in range(100):
            spec = server.call("GET", path)[1].get("spec", {})
            if ready(spec):
                break
            time.sleep(0.2)
        return spec
    status, text = install("operators", "demo", newer)
    checks.that("upgrades to a newer CRD", status == 0, text)
    spec = spec_when(lambda s: "addedLater" in s)
    checks.that("whose new field the server fills in", spec.get("addedLater") == "new", spec)
    status, text = install("operators", "demo", CHART)
    spec = spec_when(lambda s: "addedLater" not in s)
    checks.that("and goes back", status == 0 and "model" in spec and "addedLater" not in spec, f"{text} {spec}")


def check_uninstall(checks, server, install, helm_with):
    status, text = helm_with("uninstall", "demo", "--namespace", "operators")
    checks.that("uninstalls", status == 0, text)
    checks.that("nothing of the operator is left", not server.exists("-n", "operators", "deployment", "demo-qwen-pipeline")
                and not server.exists("clusterrole", "demo-qwen-pipeline"))
    checks.that("but every pipeline is", server.exists("-n", "team-a", "qwenpipeline", "digits"))
    status, text = install("operators", "demo", CHART)
    checks.that("installs again over the CRD that stayed", status == 0, text)
    helm_with("uninstall", "demo", "--namespace", "operators")
    status, text = install("team-b", "other", CHART)
    checks.that("another release does not take the CRD by stealth", status != 0 and "release-name" in text, text)
    status, text = install("team-b", "other", CHART, ["--take-ownership"])
    checks.that("but when it is told to", status == 0, text)
    helm_with("uninstall", "other", "--namespace", "team-b")


def check_one_namespace(checks, server, install):
    status, text = install("operators", "local", CHART, values={"watchNamespace": "team-a", "crds": {"install": False}, "rbac": {"aggregate": False}})
    checks.that("installs for one namespace", status == 0, text)
    resources = server.resources()
    wrong = difference(server.allowed("operators:local-qwen-pipeline", "team-a", resources), {key: verbs for key, verbs in OPERATES.items() if key != ("", "nodes")})
    checks.that("may do there what it needs", not wrong, wrong)
    wrong = difference(server.allowed("operators:local-qwen-pipeline", "team-b", resources), {})
    checks.that("and nothing at all elsewhere", not wrong, wrong)
    _, text = server.kubectl("get", "clusterroles,clusterrolebindings", "-l", "app.kubernetes.io/instance=local", "-o", "name")
    checks.that("with no right in the cluster", "clusterrole" not in text, text)


def check_monitoring(checks, server, install):
    values = {"crds": {"install": False}, "watchNamespace": "team-a", "rbac": {"aggregate": False},
              "monitoring": {"podMonitors": {"enabled": True}, "rules": {"enabled": True}, "dashboard": {"enabled": True}}}
    status, text = install("operators", "local", CHART, values=values)
    checks.that("a cluster without the Prometheus operator is told so", status == 0 and f"{MONITORING} is not in this cluster" in text, text)
    server.apply(*MONITORING_CRDS)
    server.kubectl("wait", '--for=jsonpath={.status.conditions[?(@.type=="Established")].status}=True', "--timeout=20s", "crd/podmonitors.monitoring.coreos.com", "crd/prometheusrules.monitoring.coreos.com")
    status, text = install("operators", "local", CHART, values=values)
    checks.that("one that has it since is served", status == 0 and "is not in this cluster" not in text
                and server.exists("-n", "operators", "podmonitors.monitoring.coreos.com", "local-qwen-pipeline-pipelines")
                and server.exists("-n", "operators", "prometheusrules.monitoring.coreos.com", "local-qwen-pipeline")
                and server.exists("-n", "operators", "configmap", "local-qwen-pipeline-dashboard"), text)


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="chart_install.") as folder:
        cluster = kube.Cluster(os.path.join(folder, "cluster"))
        try:
            cluster.start([], [])
            cluster.stop_after(os.getpid())
            server = Server(cluster)

            def helm_with(*arguments, values=None):
                status, out, err = helm(*arguments, "--kubeconfig", server.config, values=values, home=folder)
                return status, out + err

            def install(namespace, release, chart, flags=(), values=None):
                return helm_with("upgrade", "--install", release, chart, "--namespace", namespace, *flags, values=values or {})
            check_install(checks, server, install)
            check_pod(checks, server)
            check_rights(checks, server)
            for program in sys.argv[1:]:
                check_operator(checks, server, program, folder)
            check_documents(checks, server)
            check_upgrade(checks, server, install, folder)
            check_uninstall(checks, server, install, helm_with)
            check_one_namespace(checks, server, install)
            check_monitoring(checks, server, install)
        finally:
            cluster.stop()
    return checks.end()


if __name__ == "__main__":
    sys.exit(main())

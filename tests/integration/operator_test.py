#!/usr/bin/env python3
"""qwen-controller against a real API server, scheduler, controller manager and fake kubelets: whole lives of a QwenPipeline.

The controller is a process that this test starts, kills and stops; the kubelets run no container, so what a pod "does" is what
an annotation says (kube/fakelet.go) or, while they are frozen, what this test writes into its status. Prints a line per check
with the time it took, and fails if any fails.

usage: operator_test.py QWEN_CONTROLLER [QWENCTL]
With SLOWNESS=N in the environment it may take N times as long: for a controller that is built with a sanitizer, whose reports fail the test.
"""
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cluster"))
sys.path.insert(0, str(ROOT / "tests/sanitize"))
import cluster as kube  # noqa: E402
import reports  # noqa: E402

PIPELINES = "/apis/qwenpipeline.dev/v1alpha1/namespaces/{}/qwenpipelines"
MERGE = "application/merge-patch+json"
BUDGETS = "/apis/policy/v1/namespaces/{}/poddisruptionbudgets"
OWNED = ["/api/v1/namespaces/{}/pods", "/api/v1/namespaces/{}/services", "/api/v1/namespaces/{}/secrets",
         "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies", BUDGETS]
SLOWNESS = float(os.environ.get("SLOWNESS", "1"))
PATIENCE_S = 60 * SLOWNESS  # a machine that does other things; what is asserted about speed has its own limit
REST_S = 20 if SLOWNESS == 1 else 5
LEASE_S = max(6, min(15, round(3 * SLOWNESS)))


class Controller:
    def __init__(self, program, cluster, folder, name):
        self.log = Path(folder) / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [program, "--kubeconfig", str(cluster.dir / "admin.kubeconfig"), "--image-head", "test/head:1", "--image-stage", "test/stage:1",
                 "--metrics-port", "0", "--lease-seconds", str(LEASE_S), "--identity", name], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=reports.environment(folder))

    def port(self):
        found = re.search(r"metrics_port=(\d+)", self.log.read_text())
        return int(found.group(1)) if found else None

    def http(self, path):
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{self.port()}{path}", timeout=5) as answer:
            return answer.read().decode()

    def writes(self):
        """Requests so far that were neither reads nor renewals of the lease (the only PUTs)."""
        lines = [line for line in self.http("/metrics").splitlines() if line.startswith("rest_client_requests_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.search(r'method="(POST|PATCH|DELETE)"', line))

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=30 * SLOWNESS)


class Suite:
    def __init__(self, cluster, program, folder):
        self.cluster, self.program, self.folder = cluster, program, folder
        self.opener = cluster.opener()
        self.passed = self.failed = 0
        self.controllers = []

    def call(self, method, path, body=None, content_type="application/json"):
        request = urllib.request.Request(self.cluster.server + path, method=method, data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": content_type})
        try:
            with self.opener.open(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as e:
            text = e.read().decode(errors="replace")
            return e.code, json.loads(text) if text.startswith("{") else {"message": text}  # of a path that it does not know (yet): plain text

    def must(self, *args, **kwargs):
        code, answer = self.call(*args, **kwargs)
        if code >= 300:
            sys.exit(f"{args}: {code} {answer.get('message')}")
        return answer

    def check(self, what, good, details=""):
        print(f"{'ok  ' if good else 'FAIL'} {what}" + ("" if good else f": {details}"), flush=True)
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)

    def within(self, what, limit_s, met, details=lambda: ""):
        """Waits for met() up to PATIENCE_S; it must be true within limit_s."""
        start = time.monotonic()
        while not (good := met()) and time.monotonic() - start < PATIENCE_S:
            if any(controller.process.poll() == reports.EXIT_CODE for controller in self.controllers):
                sys.exit("\n".join(["a sanitizer ended the controller", *reports.read(self.folder)]))
            time.sleep(0.05)
        took = time.monotonic() - start
        self.check(f"{what} ({took:.2f} s)", good and took <= limit_s * SLOWNESS, f"limit {limit_s * SLOWNESS:g} s; {details()}")
        return took

    # -- what is there

    def start(self, name):
        controller = Controller(self.program, self.cluster, self.folder, name)
        self.controllers.append(controller)
        return controller

    def pipeline(self, name, namespace="default"):
        return self.call("GET", f"{PIPELINES.format(namespace)}/{name}")[1]

    def condition(self, name, kind="Ready", namespace="default"):
        found = self.pipeline(name, namespace)  # or an answer that there is none
        conditions = found.get("status", {}).get("conditions", []) if found.get("kind") == "QwenPipeline" else []
        return next((c for c in conditions if c["type"] == kind), {"status": "", "reason": "", "message": ""})

    def ready(self, name):
        status = self.pipeline(name).get("status", {})
        return self.condition(name)["status"] == "True" and status.get("observedGeneration") == self.pipeline(name)["metadata"]["generation"]

    def pods(self, name, namespace="default"):
        listed = self.must("GET", f"/api/v1/namespaces/{namespace}/pods?labelSelector=qwenpipeline.dev/pipeline%3D{name}")["items"]
        return {pod["metadata"]["name"]: pod for pod in listed}

    def names(self, name):
        return sorted(n for n, pod in self.pods(name).items() if "deletionTimestamp" not in pod["metadata"])

    def fake(self, pod, what, value):
        """A fault that the pod's fake kubelet plays."""
        self.must("PATCH", f"/api/v1/namespaces/default/pods/{pod}", {"metadata": {"annotations": {f"fake-node/{what}": value}}}, MERGE)

    def spec(self, name, **changes):
        self.must("PATCH", f"{PIPELINES.format('default')}/{name}", {"spec": changes}, MERGE)

    def make(self, name, count, namespace="default", **spec):
        self.must("POST", PIPELINES.format(namespace), {
            "apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": name, "namespace": namespace},
            "spec": {"model": {"id": "m", "source": {"persistentVolumeClaim": {"claimName": "weights"}}}, "stages": {"count": count}, "engine": {"device": "Cpu"}, **spec}})

    def remove(self, name, namespace="default"):
        self.must("DELETE", f"{PIPELINES.format(namespace)}/{name}", {"propagationPolicy": "Background"})

    def left(self, name, namespace="default"):
        selector = f"?labelSelector=qwenpipeline.dev/pipeline%3D{name}"
        return [item["metadata"]["name"] for path in OWNED for item in self.must("GET", path.format(namespace) + selector)["items"]]

    # -- stories

    def prepare(self):
        kubectl = [str(kube.binaries() / "kubectl"), "--kubeconfig", str(self.cluster.dir / "admin.kubeconfig")]
        def run(*args):
            return subprocess.run([*kubectl, *args], capture_output=True, text=True, check=True).stdout
        run("apply", "-f", str(ROOT / "crds/qwenpipeline.yaml"))
        definition = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev"
        self.within("the definition is established", 30, lambda: any(c["type"] == "Established" and c["status"] == "True"
                                                                   for c in self.must("GET", definition).get("status", {}).get("conditions") or []))
        size = {"storage": "1Gi"}
        self.must("POST", "/api/v1/persistentvolumes", {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "weights"},
            "spec": {"capacity": size, "accessModes": ["ReadOnlyMany"], "hostPath": {"path": "/models"}, "storageClassName": "",
                     "claimRef": {"namespace": "default", "name": "weights"}}})
        self.must("POST", "/api/v1/namespaces/default/persistentvolumeclaims", {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "weights"},
            "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": "weights", "resources": {"requests": size}}})
        run("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/weights", "--timeout=30s")
        digits = json.loads(run("create", "--dry-run=client", "-o", "json", "-f", str(ROOT / "docs/examples/digits.yaml")))
        digits["metadata"] = {"name": "digits", "namespace": "default"}
        digits["spec"]["model"]["source"] = {"persistentVolumeClaim": {"claimName": "weights"}}
        return digits

    def creation(self, digits):
        self.cluster.signal("fakelet", signal.SIGSTOP)
        made = self.must("POST", PIPELINES.format("default"), digits)
        expected = ["digits-0-head-1"] + [f"digits-0-stage-{k}-1" for k in range(4)]
        self.within("a head and four stages exist", 5, lambda: self.names("digits") == expected, lambda: self.names("digits"))
        self.within("it is not Ready while no kubelet says so, and says which pod", 5, lambda: "pod digits-0-" in self.condition("digits")["message"],
                    lambda: self.condition("digits"))
        owner = {"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "name": "digits", "uid": made["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}
        for name, pod in self.pods("digits").items():
            labels = pod["metadata"]["labels"]
            good = pod["metadata"]["ownerReferences"] == [owner] and labels["qwenpipeline.dev/epoch"] == "1" and labels["qwenpipeline.dev/replica"] == "0" and \
                labels["qwenpipeline.dev/role"] == ("head" if "head" in name else "stage")
            self.check(f"{name} has its labels and owner", good, pod["metadata"])
        self.cluster.signal("fakelet", signal.SIGCONT)
        self.within("it is Ready when the kubelets say so", 10, lambda: self.ready("digits"), lambda: self.condition("digits"))
        status = self.pipeline("digits")["status"]
        self.check("its counts are right", (status["stages"], status["replicas"], status["readyReplicas"], status["restarts"], status["epoch"]) == ("4/4", 1, 1, 0, 1), status)
        stale = {"metadata": {"resourceVersion": made["metadata"]["resourceVersion"]}, "status": {"epoch": 0}}
        self.check("a status that was made from an old version is refused", self.call("PATCH", f"{PIPELINES.format('default')}/digits/status", stale, MERGE)[0] == 409 and
                   self.pipeline("digits")["status"]["epoch"] == 1, self.pipeline("digits")["status"])
        self.check("Services, a Secret, a NetworkPolicy and a PodDisruptionBudget stand beside it", set(self.left("digits")) - set(self.pods("digits")) == {"digits", "digits-group", "digits-handshake"},
                   self.left("digits"))

    def rest(self, controller):
        def versions():
            items = [item for path in OWNED + [PIPELINES, "/apis/events.k8s.io/v1/namespaces/{}/events"] for item in self.must("GET", path.format("default"))["items"]
                     if item.get("regarding", {}).get("kind", "QwenPipeline") == "QwenPipeline"]  # nodes and pods have events of others
            return {(i["metadata"]["name"], i["metadata"]["resourceVersion"]) for i in items}
        time.sleep(1)
        before, writes = versions(), controller.writes()
        time.sleep(REST_S)
        self.check(f"{REST_S} s of rest: no write but renewals of the lease", controller.writes() == writes, f"{controller.writes() - writes} requests")
        self.check("and no object changed", versions() == before, versions() ^ before)

    def loss(self):
        before = {n: pod["metadata"]["uid"] for n, pod in self.pods("digits").items()}
        self.must("DELETE", "/api/v1/namespaces/default/pods/digits-0-stage-2-1", {"gracePeriodSeconds": 0})
        expected = ["digits-0-head-1", "digits-0-stage-0-1", "digits-0-stage-1-1", "digits-0-stage-2-2", "digits-0-stage-3-1"]
        self.within("a killed pod is made again under the next epoch", 5, lambda: self.names("digits") == expected, lambda: self.names("digits"))
        self.within("and its group is Ready again", 10, lambda: self.ready("digits") and sorted(self.pods("digits")) == expected, lambda: self.condition("digits"))
        after = {n: pod["metadata"]["uid"] for n, pod in self.pods("digits").items()}
        self.check("every other pod is the one that it was", {n: u for n, u in after.items() if n in before} == {n: u for n, u in before.items() if n in after}, (before, after))
        self.check("one restart is counted", self.pipeline("digits")["status"]["restarts"] == 1, self.pipeline("digits")["status"])

    def node(self, name, **changes):
        self.must("PATCH", f"/api/v1/nodes/{name}", changes, MERGE)

    def dead_node(self):
        self.make("moved", 3)
        self.within("a pipeline serves before its node dies", 10, lambda: self.ready("moved"), lambda: self.condition("moved"))
        node = self.pods("moved")["moved-0-stage-1-1"]["spec"]["nodeName"]
        self.node(node, metadata={"annotations": {"fake-node/silent": "true"}})  # no kubelet confirms anything there from now on
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.must("PATCH", f"/api/v1/nodes/{node}/status", {"status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "lastHeartbeatTime": now, "lastTransitionTime": now}]}},
            "application/strategic-merge-patch+json")
        self.within("a node without power: what stood there is made again at once", 2, lambda: "moved-0-stage-1-2" in self.names("moved"), lambda: self.names("moved"))
        self.within("and serves, whatever is stuck", 10, lambda: self.ready("moved"), lambda: self.condition("moved"))
        stuck = [n for n, pod in self.pods("moved").items() if pod["spec"].get("nodeName") == node]
        self.check("the dead node's pods are still there", stuck and all("deletionTimestamp" in self.pods("moved")[n]["metadata"] for n in stuck), stuck)
        self.check("no new pod went there", not any(n.endswith("-2") for n in stuck), stuck)
        self.node(node, spec={"taints": [{"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}]})
        def ending():
            return [p["metadata"]["name"] for p in self.must("GET", f"/api/v1/namespaces/default/pods?fieldSelector=spec.nodeName%3D{node}")["items"]
                    if "deletionTimestamp" in p["metadata"]]
        self.within("out of service: their objects are deleted by force", 5, lambda: not ending(), ending)
        self.node(node, spec={"taints": []}, metadata={"annotations": {"fake-node/silent": None}})
        self.remove("moved")
        self.within("a node that comes back hinders nothing", 30, lambda: not self.left("moved"), lambda: self.left("moved"))

    def crash_loop(self):
        self.fake("digits-0-stage-1-1", "exit", "70")  # the second failure: this restart waits 10 s
        self.within("a crash loop is named with its pod and reason", 5,
                    lambda: "pod digits-0-stage-1-1 ended: exit code 70 (GPU fault)" in self.condition("digits")["message"] and self.condition("digits")["reason"] == "CrashLoop",
                    lambda: self.condition("digits"))
        self.check("the pod stays for a look during the back-off", "digits-0-stage-1-1" in self.names("digits"), self.names("digits"))

    def comes_back(self):
        expected = ["digits-0-head-1", "digits-0-stage-0-1", "digits-0-stage-1-3", "digits-0-stage-2-2", "digits-0-stage-3-1"]
        self.within("after its back-off the crashed stage is made again and its group serves", 15, lambda: self.ready("digits") and self.names("digits") == expected,
                    lambda: (self.names("digits"), self.condition("digits")))
        events = self.must("GET", "/apis/events.k8s.io/v1/namespaces/default/events")["items"]
        reasons = [e["reason"] for e in events if e.get("regarding", {}).get("name") == "digits"]
        self.check("events tell the story", reasons.count("PodLost") == 2 and reasons.count("GroupCreated") == 1, reasons)

    def loading(self):
        """A head says how far its stages are; the status repeats it. The head is this test, under an address of its own."""
        answer = {"status": "not ready", "stages": [{"stage": 0, "connected": True, "loaded": True, "load_percent": 100},
                                                    {"stage": 1, "connected": True, "loaded": False, "load_percent": 47}]}

        class Head(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(503 if self.path == "/ready" else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.77", 8000), Head)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.make("slow", 2)
        self.within("a pipeline to load serves", 20, lambda: self.ready("slow"), lambda: self.condition("slow"))
        self.must("PATCH", "/api/v1/namespaces/default/pods/slow-0-head-1/status", {"status": {"podIP": "127.0.0.77", "podIPs": [{"ip": "127.0.0.77"}]}}, MERGE)
        self.fake("slow-0-stage-1-1", "ready", "never")

        def loads():
            return self.pipeline("slow")["status"]["groups"][0].get("loading")
        self.within("a stage that loads: how far it is stands in the status", 15, lambda: loads() == [{"stage": 1, "percent": 40}], loads)
        self.within("and in the condition", 5, lambda: self.condition("slow")["reason"] == "LoadingWeights" and
                    "pod slow-0-stage-1-1 has loaded 40 % of its weights" in self.condition("slow")["message"], lambda: self.condition("slow"))
        answer["stages"][1] = {"stage": 1, "connected": True, "loaded": True, "load_percent": 100}
        self.within("it has loaded: nothing of it is left", 15, lambda: not loads() and self.condition("slow")["reason"] == "PodsNotReady", loads)
        self.fake("slow-0-stage-1-1", "ready", None)
        self.within("it is ready: all serve", 15, lambda: self.ready("slow"), lambda: self.condition("slow"))
        self.remove("slow")
        server.shutdown()
        server.server_close()

    def terminal(self, qwenctl):
        def run(*args):
            done = subprocess.run([qwenctl, *args, "--kubeconfig", str(self.cluster.dir / "admin.kubeconfig")], capture_output=True, text=True, timeout=30)
            return done.returncode, done.stdout + done.stderr
        code, text = run("status")
        self.check("qwenctl status lists the pipelines", code == 0 and re.search(r"digits +True +AllReplicasReady +4/4", text), text)
        code, text = run("status", "digits")
        self.check("and tells of one its conditions and pods", code == 0 and "Ready=True  AllReplicasReady: 1 of 1 replica serves" in text
                   and re.search(r"digits-0-stage-3-1 +fake-\d+ +ready", text), text)
        code, text = run("diff", "digits", "--image-head", "test/head:1", "--image-stage", "test/stage:1")
        self.check("qwenctl diff of a pipeline at rest: nothing", code == 0 and text.endswith("nothing to do\n"), text)
        code, text = run("diff", "digits", "--image-head", "test/head:1", "--image-stage", "test/stage:2")
        self.check("with another image: the pods that would be made", code == 0 and "+ Pod/digits-0-stage-3-2\n" in text and 'image: "test/stage:2"' in text, text)
        self.check("and nothing was done", sorted(self.pods("digits")) == ["digits-0-head-1"] + [f"digits-0-stage-{k}-1" for k in range(4)])
        plugin = subprocess.run([str(kube.binaries() / "kubectl"), "qwenpipeline", "status", "--kubeconfig", str(self.cluster.dir / "admin.kubeconfig")],
                                capture_output=True, text=True, timeout=30, env={**os.environ, "PATH": str(Path(qwenctl).resolve().parent) + ":" + os.environ["PATH"]})
        self.check("kubectl qwenpipeline is the same", plugin.returncode == 0 and "AllReplicasReady" in plugin.stdout, plugin.stdout + plugin.stderr)
        code, text = run("status", "nobody")
        self.check("of none it says so", code == 1 and '"nobody" not found' in text, text)

    def image_pull(self):
        self.cluster.signal("fakelet", signal.SIGSTOP)
        self.make("broken", 1)
        self.within("another pipeline has its pods", 5, lambda: len(self.names("broken")) == 2, lambda: self.names("broken"))
        (stage,) = [n for n in self.names("broken") if "stage" in n]
        waiting = {"name": "stage", "image": "test/stage:1", "imageID": "", "ready": False, "restartCount": 0,
                   "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"test/stage:1\""}}}
        self.must("PATCH", f"/api/v1/namespaces/default/pods/{stage}/status", {"status": {"containerStatuses": [waiting]}}, MERGE)
        self.within("an image that cannot be pulled is named", 5, lambda: self.condition("broken")["reason"] == "ImagePullFailed" and
                    self.condition("broken")["message"].startswith(f"pod {stage}: ImagePullBackOff: Back-off pulling image"), lambda: self.condition("broken"))
        self.cluster.signal("fakelet", signal.SIGCONT)
        self.check("it owns two pods, two Services, a Secret, a policy and a budget", len(self.left("broken")) == 7, self.left("broken"))
        self.remove("broken")
        self.within("its deletion leaves nothing", 30, lambda: not self.left("broken") and self.pipeline("broken").get("code") == 404, lambda: self.left("broken"))

    def repair(self):
        service = "/api/v1/namespaces/default/services/digits"
        good = self.must("GET", service)["spec"]["selector"]
        self.must("PATCH", service, {"spec": {"selector": {"qwenpipeline.dev/role": "stage"}}}, MERGE)
        self.within("a Service that somebody changed is put right", 5, lambda: self.must("GET", service)["spec"]["selector"] == good)
        budget = BUDGETS.format("default") + "/digits"
        self.must("DELETE", budget)
        self.within("a budget that somebody deleted is back", 5, lambda: self.call("GET", budget)[0] == 200)
        self.within("it lets one pod be evicted", 10, lambda: self.call("GET", budget)[1].get("status", {}).get("disruptionsAllowed") == 1, lambda: self.call("GET", budget))

        def evict(pod):
            return self.call("POST", f"/api/v1/namespaces/default/pods/{pod}/eviction?dryRun=All", {
                "apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "default"}, "deleteOptions": {"dryRun": ["All"]}})[0]
        self.check("as the API server says too", evict("digits-0-stage-0-1") == 201)

    def wrong_spec(self):
        self.make("even", 1)
        self.within("a pipeline serves", 10, lambda: self.ready("even"), lambda: self.condition("even"))
        self.spec("even", stages={"count": 1, "balance": "EvenLayers"})
        self.within("a spec that the API server takes and no cluster can run is named", 5, lambda: self.condition("even")["reason"] == "InvalidSpec" and
                    "spec.stages.balance" in self.condition("even")["message"], lambda: self.condition("even"))
        self.check("and what served goes on", len(self.names("even")) == 2, self.names("even"))
        events = self.must("GET", "/apis/events.k8s.io/v1/namespaces/default/events")["items"]
        self.within("an event says so", 5, lambda: "InvalidSpec" in [e["reason"] for e in self.must("GET", "/apis/events.k8s.io/v1/namespaces/default/events")["items"]
                                                                    if e.get("regarding", {}).get("name") == "even"], lambda: events)

    def surge(self):
        self.spec("even", stages={"count": 1, "balance": "Time", "template": {"image": "test/stage:2"}})
        self.within("another image: a new group beside the old one, which then goes", 15,
                    lambda: self.ready("even") and sorted(self.pods("even")) == ["even-0-head-2", "even-0-stage-0-2"], lambda: (self.names("even"), self.condition("even")))
        self.check("with that image", self.pods("even")["even-0-stage-0-2"]["spec"]["containers"][0]["image"] == "test/stage:2")
        self.spec("even", stages={"count": 1, "balance": "Time", "template": {"image": "test/stage:3", "nodeSelector": {"no": "where"}}},
                  rollout={"surgeTimeoutSeconds": 3600})
        self.within("a new group that finds no node is named", 5, lambda: self.condition("even")["reason"] == "Unschedulable", lambda: self.condition("even"))
        ready = [n for n, pod in self.pods("even").items() if any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))]
        self.check("while the old one serves", sorted(ready)[0] == "even-0-head-2" and "even-0-stage-0-2" in ready, ready)
        self.spec("even", rollout={"surgeTimeoutSeconds": 0})
        self.within("and gives way when it has waited long enough", 10, lambda: self.names("even") == ["even-0-head-4", "even-0-stage-0-4"], lambda: self.names("even"))
        self.spec("even", stages={"count": 1, "template": {"image": "test/stage:3", "nodeSelector": None}})
        self.within("what never served is replaced at once", 10, lambda: self.ready("even") and len(self.pods("even")) == 2, lambda: self.condition("even"))

    def gang(self):
        self.must("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", {
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "podgroups.scheduling.x-k8s.io",
                "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/scheduler-plugins/pull/50"}},
            "spec": {"group": "scheduling.x-k8s.io", "scope": "Namespaced", "names": {"kind": "PodGroup", "plural": "podgroups", "singular": "podgroup"},
                     "versions": [{"name": "v1alpha1", "served": True, "storage": True,
                                   "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}}]}})
        groups = "/apis/scheduling.x-k8s.io/v1alpha1/namespaces/default/podgroups"
        self.within("a definition of PodGroups is there", 20, lambda: self.call("GET", groups)[0] == 200)
        self.make("gang", 2, scheduling={"gang": "Coscheduling", "schedulerName": "default-scheduler", "topologyKey": "kubernetes.io/hostname", "topologyPolicy": "Required"})
        self.within("a gang serves", 20, lambda: self.ready("gang"), lambda: self.condition("gang"))
        self.check("on one node, as its topology says", len({pod["spec"]["nodeName"] for pod in self.pods("gang").values()}) == 1, self.names("gang"))
        self.within("with a PodGroup of its size", 5, lambda: self.call("GET", groups + "/gang-0-1")[1].get("spec") == {"minMember": 3}, lambda: self.call("GET", groups))
        self.make("other", 1, scheduling={"gang": "Volcano", "schedulerName": "default-scheduler"})
        self.within("a gang scheduler that is not there is named", 5, lambda: self.condition("other", "Progressing")["reason"] == "WriteRefused" and
                    "scheduling.volcano.sh" in self.condition("other", "Progressing")["message"], lambda: self.condition("other", "Progressing"))
        for name in ("gang", "other"):
            self.remove(name)
        self.within("both go, and the PodGroup with its head", 40, lambda: not self.left("gang") and not self.left("other") and not self.must("GET", groups)["items"],
                    lambda: (self.left("gang"), self.left("other")))

    def export(self):
        for k in range(2):
            self.must("POST", "/api/v1/persistentvolumes", {
                "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"shard-{k}"},
                "spec": {"capacity": {"storage": "2Gi"}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": f"/shards/{k}"}, "storageClassName": ""}})
        layers = [{"name": "front", "layers": {"begin": 0, "end": 4}}, {"name": "back", "layers": {"begin": 4, "end": 8}}]
        self.make("shards", 2, stages={"list": layers}, weights={"mode": "Export", "size": "2Gi", "storageClassName": "", "template": {"image": "test/export:1"}})
        jobs = "/apis/batch/v1/namespaces/default/jobs?labelSelector=qwenpipeline.dev/pipeline%3Dshards"
        self.within("shards: a claim and a Job a stage", 5, lambda: len(self.must("GET", jobs)["items"]) == 2, lambda: self.condition("shards"))
        self.within("and no pod of a group before they are complete", 5, lambda: self.condition("shards")["reason"] == "Exporting" and not self.pods("shards"),
                    lambda: (self.condition("shards"), self.names("shards")))
        pods = "/api/v1/namespaces/default/pods?labelSelector=app.kubernetes.io/component%3Dexport"
        self.within("the Jobs' pods run", 20, lambda: [p["status"]["phase"] for p in self.must("GET", pods)["items"]] == ["Running"] * 2, lambda: self.must("GET", pods)["items"])
        self.cluster.signal("fakelet", signal.SIGSTOP)  # it would say that they run still
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for pod in self.must("GET", pods)["items"]:
            ended = {"name": "export", "image": "test/export:1", "imageID": "", "ready": False, "restartCount": 0,
                     "state": {"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": now, "finishedAt": now}}}
            self.must("PATCH", f"/api/v1/namespaces/default/pods/{pod['metadata']['name']}/status", {"status": {"phase": "Succeeded", "containerStatuses": [ended]}}, MERGE)
        self.within("when they are complete the group begins", 15, lambda: len(self.names("shards")) == 3, lambda: self.condition("shards"))
        self.check("and WeightsReady says so", self.condition("shards", "WeightsReady")["status"] == "True", self.condition("shards", "WeightsReady"))
        mounted = [pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] for n, pod in sorted(self.pods("shards").items())]
        self.check("its stages read their own claims, its head the checkpoint", mounted[0] == "weights" and mounted[1].startswith("shards-weights-")
                   and mounted[1].endswith("-0") and mounted[2].endswith("-1"), mounted)
        self.cluster.signal("fakelet", signal.SIGCONT)
        self.within("it serves", 20, lambda: self.ready("shards"), lambda: self.condition("shards"))
        self.remove("shards")
        claims = "/api/v1/namespaces/default/persistentvolumeclaims?labelSelector=qwenpipeline.dev/pipeline%3Dshards"
        self.within("deleted: claims, Jobs and their pods go with it", 60, lambda: not self.left("shards") and not self.must("GET", jobs)["items"]
                    and not self.must("GET", claims)["items"] and not self.must("GET", pods)["items"], lambda: (self.left("shards"), self.must("GET", jobs)["items"]))

    def drain(self):
        self.cluster.signal("fakelet", signal.SIGSTOP)  # nothing that is deleted ends
        head, stage = self.names("even")
        self.remove("even")
        self.within("a deleted pipeline: its head is told to end", 5, lambda: self.names("even") == [stage], lambda: self.names("even"))
        self.within("and the condition says what it waits for", 15, lambda: self.condition("even")["reason"] == "Deleting" and
                    self.condition("even")["message"] == f"pod {head} finishes its requests", lambda: self.condition("even"))
        time.sleep(1)
        self.check("the stage stays until the head is gone", self.names("even") == [stage] and "even" in self.left("even"), self.names("even"))
        # A pipeline whose pods are gone waits for those of others only while these really go.
        path, model = "/api/v1/namespaces/default/pods", self.pods("even")[stage]
        for i in range(10):
            self.must("POST", path, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"stuck-{i}", "labels": {"qwenpipeline.dev/pipeline": "nobody"}},
                                     "spec": {"nodeName": model["spec"]["nodeName"], "containers": [{"name": "c", "image": "c"}]}})
            self.must("DELETE", f"{path}/stuck-{i}")
        self.make("idle", 1, suspend=True)
        self.within("a suspended pipeline has its finalizer", 10, lambda: self.pipeline("idle")["metadata"].get("finalizers"))
        self.remove("idle")
        self.within("ten pods that are stuck do not keep it from going", 10, lambda: self.pipeline("idle").get("code") == 404, lambda: self.pipeline("idle"))
        self.cluster.signal("fakelet", signal.SIGCONT)
        self.within("then everything goes, the pipeline last", 30, lambda: not self.left("even") and self.pipeline("even").get("code") == 404, lambda: self.left("even"))

    def quota(self):
        self.must("POST", "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tight"}})
        self.must("POST", "/api/v1/namespaces/tight/resourcequotas", {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": {"pods": "2"}}})
        self.within("a quota is in force", 20, lambda: self.must("GET", "/api/v1/namespaces/tight/resourcequotas/q").get("status", {}).get("hard"))
        self.make("many", 3, "tight")
        self.within("a quota that is too small is named", 5, lambda: self.condition("many", namespace="tight")["reason"] == "QuotaExceeded",
                    lambda: self.condition("many", namespace="tight"))

    def scale(self):
        self.make("two", 2)
        self.within("a pipeline of two stages serves", 10, lambda: self.ready("two"), lambda: self.condition("two"))
        self.must("PATCH", f"{PIPELINES.format('default')}/two/scale", {"spec": {"replicas": 2}}, MERGE)
        self.within("scaled to 2 by the scale subresource", 10, lambda: self.ready("two") and self.pipeline("two")["status"]["readyReplicas"] == 2, lambda: self.condition("two"))
        self.check("the second group has its own epoch", "two-1-head-2" in self.names("two") and "two-0-head-1" in self.names("two"), self.names("two"))
        self.spec("two", suspend=True)
        self.within("suspended: no pod is left", 10, lambda: not self.pods("two") and self.condition("two")["reason"] == "Suspended",
                    lambda: (self.names("two"), self.condition("two")))
        self.spec("two", suspend=False, replicas=1)
        self.within("resumed under an epoch that never was", 10, lambda: self.ready("two") and self.names("two")[0] == "two-0-head-3", lambda: self.names("two"))

    def killed_in_the_middle(self, first):
        self.make("long", 32)
        while not self.pods("long"):
            time.sleep(0.002)
        first.end(signal.SIGKILL)
        there = len(self.pods("long"))
        second = self.start("second")
        self.within(f"a controller killed with {there} of 33 pods made: the next one completes the group", 30, lambda: self.ready("long"), lambda: self.condition("long"))
        epochs = {pod["metadata"]["labels"]["qwenpipeline.dev/epoch"] for pod in self.pods("long").values()}
        self.check("under the same epoch, with every pod once", epochs == {"1"} and len(self.pods("long")) == 33, (epochs, len(self.pods("long"))))
        return second

    def handover(self, second):
        third = self.start("third")
        self.within("a standby is ready without leading", 10, lambda: third.port() and self.http_ok(third, "/readyz"))
        started = time.monotonic()
        code = second.end()
        self.check(f"SIGTERM ends the leader with 0 ({time.monotonic() - started:.2f} s)", code == 0, code)
        self.must("DELETE", "/api/v1/namespaces/default/pods/long-0-stage-5-1", {"gracePeriodSeconds": 0})
        self.within("the standby takes over at once and repairs", 5, lambda: "long-0-stage-5-2" in self.names("long"), lambda: self.names("long"))
        for name in ("digits", "two", "long"):
            self.remove(name)
        self.within("deletion leaves nothing", 30, lambda: not any(self.left(n) for n in ("digits", "two", "long")),
                    lambda: [(self.left(n), self.condition(n), {p: pod["metadata"].get("deletionTimestamp") for p, pod in self.pods(n).items()}) for n in ("digits", "two", "long")])
        return third

    def namespace_goes(self):
        self.must("DELETE", "/api/v1/namespaces/tight")
        self.within("a namespace goes with the pipeline in it", 60, lambda: self.call("GET", "/api/v1/namespaces/tight")[0] == 404,
                    lambda: self.call("GET", "/api/v1/namespaces/tight")[1].get("status"))

    @staticmethod
    def http_ok(controller, path):
        try:
            return bool(controller.http(path))
        except OSError:
            return False

    def run(self):
        digits = self.prepare()
        first = self.start("first")
        self.within("the controller is ready", 10, lambda: first.port() and self.http_ok(first, "/readyz"), lambda: first.log.read_text()[-2000:])
        self.creation(digits)
        self.rest(first)
        for qwenctl in sys.argv[2:]:
            self.terminal(qwenctl)
        self.repair()
        self.loading()
        self.wrong_spec()
        self.surge()
        self.gang()
        self.export()
        self.drain()
        self.loss()
        self.crash_loop()
        self.image_pull()
        self.quota()
        self.comes_back()
        self.scale()
        self.dead_node()
        memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{first.process.pid}/status").read_text()).group(1)
        print(f"     the controller holds {int(memory) / 1024:.1f} MiB after {first.writes():.0f} writes")
        second = self.killed_in_the_middle(first)
        third = self.handover(second)
        self.namespace_goes()
        self.check("the last one ends with 0 too", third.end() == 0, third.process.returncode)
        said = reports.read(self.folder)
        self.check("no sanitizer said anything", not said, "\n".join(said))


def main():
    program = sys.argv[1]
    started = time.monotonic()
    suite = None
    with tempfile.TemporaryDirectory(prefix="operator_test.") as folder:
        cluster = kube.Cluster(os.path.join(folder, "cluster"))
        try:
            cluster.start(["kube-controller-manager", "kube-scheduler", "fakelet"], [])
            cluster.stop_after(os.getpid())
            cluster.nodes(4)
            print(f"a cluster in {time.monotonic() - started:.1f} s", flush=True)
            suite = Suite(cluster, program, folder)
            suite.run()
        finally:
            for controller in suite.controllers if suite else []:
                controller.end(signal.SIGKILL)
                if suite.failed or sys.exc_info()[0]:
                    print(f"---- end of {controller.log.name}\n" + controller.log.read_text()[-3000:])
            cluster.stop()
    print(f"{suite.passed} passed, {suite.failed} failed in {time.monotonic() - started:.1f} s")
    return 1 if suite.failed else 0


if __name__ == "__main__":
    sys.exit(main())

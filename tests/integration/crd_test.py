#!/usr/bin/env python3
"""crds/qwenpipeline.yaml in a real API server: what it accepts, what it refuses and with which words, what it fills in.

Each case is a small change of one good manifest. A refused one must name the field and say why, because that is all that a
person with kubectl sees; there is no webhook behind the schema. Prints a line per case and fails if any differs.
"""
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cluster"))
import cluster as kube  # noqa: E402

BASE = {"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": "q", "namespace": "default"},
        "spec": {"model": {"id": "m", "source": {"path": "/models/m"}}, "stages": {"count": 2}}}
POD = {"image": "registry.example.com/qwen:1", "env": [{"name": "X", "value": "1"}], "resources": {"limits": {"memory": "64Gi", "cpu": 8}, "requests": {"cpu": "500m"}},
       "nodeSelector": {"gpu": "h200"}, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
       "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}], "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
       "imagePullSecrets": [{"name": "registry"}], "annotations": {"a": "b"}, "priorityClassName": "high"}
DROP = object()  # a value that means: no such field
PVC = {"persistentVolumeClaim": {"claimName": "w"}}


def stage(name, begin, end, **more):
    return {"name": name, "layers": {"begin": begin, "end": end}, **more}


# (what, {dotted path: value}, None when accepted, else a regular expression that the refusal must match)
CASES = [
    ("the smallest manifest", {}, None),
    ("a claim instead of a path", {"spec.model.source": PVC}, None),
    ("a claim with a subPath", {"spec.model.source.path": DROP, "spec.model.source.persistentVolumeClaim": {"claimName": "w", "subPath": "a/b"}}, None),
    ("explicit stages", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 10, 20)]}}, None),
    ("a stage with its own environment", {"spec.stages": {"list": [stage("a", 0, 10, env=[{"name": "X", "value": "1"}])]}}, None),
    ("64 stages", {"spec.stages.count": 64}, None),
    ("64 listed stages", {"spec.stages": {"list": [stage(f"s{i}", i, i + 1) for i in range(64)]}}, None),
    ("NCCL between GPUs", {"spec.transport": {"type": "NCCL"}}, None),
    ("a CPU pipeline", {"spec.engine": {"device": "Cpu"}}, None),
    ("no replicas", {"spec.replicas": 0}, None),
    ("suspended", {"spec.suspend": True}, None),
    ("a 40-letter name", {"metadata.name": "q" * 40}, None),
    ("API keys from a Secret", {"spec.server": {"apiKeys": {"secretName": "keys"}}}, None),
    ("what a head's pod has", {"spec.head": POD}, None),
    ("what every stage's pod has", {"spec.stages.template": POD}, None),
    ("what one stage's pod has", {"spec.stages": {"list": [stage("a", 0, 10, **POD), stage("b", 10, 20)]}}, None),
    ("the whole of 64 stages", {"spec.stages": {"list": [stage(f"s{i}", i, i + 1, **POD) for i in range(64)]}}, None),
    ("a model of a known shape that fits", {"spec.model.shape": "Qwen3-VL-235B-A22B", "spec.stages.gpuMemoryGB": 141}, None),
    ("a gang of Kueue", {"spec.scheduling": {"gang": "Kueue", "queueName": "team-a", "topologyKey": "rack", "topologyPolicy": "Required"}}, None),
    ("a gang of Volcano", {"spec.scheduling": {"gang": "Volcano"}}, None),
    ("RDMA", {"spec.transport": {"rdma": {"resource": "rdma/hca"}}}, None),
    ("one claim a stage", {"spec.weights": {"mode": "PerStage", "claimPrefix": "shard"}}, None),
    ("exported shards", {"spec.weights": {"mode": "Export", "size": "60Gi", "storageClassName": "", "accessMode": "ReadWriteMany", "template": POD}}, None),
    ("a rollout in place", {"spec.rollout": {"strategy": "Replace"}}, None),
    ("time to start", {"spec.restart": {"startupTimeoutSeconds": 86400, "stallTimeoutSeconds": 30}}, None),
    ("no wait before SIGTERM", {"spec.server": {"preStopSeconds": 0}}, None),
    ("its own network policy", {"spec.networkPolicy": "None"}, None),
    ("hosts of images", {"spec.server": {"allowedImageHosts": ["images.example.com"]}}, None),

    ("no spec", {"spec": DROP}, r"spec: Required value"),
    ("no model", {"spec.model": DROP}, r"spec\.model: Required value"),
    ("no stages", {"spec.stages": DROP}, r"spec\.stages: Required value"),
    ("no model id", {"spec.model.id": DROP}, r"spec\.model\.id: Required value"),
    ("an empty model id", {"spec.model.id": ""}, r"spec\.model\.id.*at least 1 char"),
    ("a model id of 254 letters", {"spec.model.id": "m" * 254}, r"spec\.model\.id: Too long"),
    ("no source", {"spec.model.source": DROP}, r"spec\.model\.source: Required value"),
    ("two sources", {"spec.model.source": {"path": "/m", **PVC}}, r"spec\.model\.source.*exactly one of path and persistentVolumeClaim"),
    ("neither source", {"spec.model.source": {}}, r"spec\.model\.source.*exactly one of path and persistentVolumeClaim"),
    ("a claim without a name", {"spec.model.source": {"persistentVolumeClaim": {}}}, r"claimName: Required value"),
    ("an unknown dtype", {"spec.model.dtype": "Int4"}, r'spec\.model\.dtype: Unsupported value: "Int4"'),
    ("maxModelLen 0", {"spec.model.maxModelLen": 0}, r"spec\.model\.maxModelLen.*greater than or equal to 1"),
    ("maxModelLen as text", {"spec.model.maxModelLen": "4096"}, r"spec\.model\.maxModelLen.*must be of type integer"),
    ("no stage", {"spec.stages.count": 0}, r"spec\.stages\.count.*greater than or equal to 1"),
    ("65 stages", {"spec.stages.count": 65}, r"spec\.stages\.count.*less than or equal to 64"),
    ("count and list", {"spec.stages.list": [stage("a", 0, 1)]}, r"spec\.stages.*exactly one of count and list"),
    ("neither count nor list", {"spec.stages": {}}, r"spec\.stages.*exactly one of count and list"),
    ("an empty list", {"spec.stages": {"list": []}}, r"spec\.stages\.list.*at least 1 items"),
    ("65 listed stages", {"spec.stages": {"list": [stage(f"s{i}", i, i + 1) for i in range(65)]}}, r"spec\.stages\.list: Too many: 65"),
    ("a gap between stages", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 11, 20)]}}, r"spec\.stages\.list.*without a gap or an overlap"),
    ("stages that overlap", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 9, 20)]}}, r"spec\.stages\.list.*without a gap or an overlap"),
    ("two last stages of one range", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 10, 20), stage("c", 10, 20)]}},
     r"spec\.stages\.list.*without a gap or an overlap"),
    ("two first stages", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 0, 10)]}}, r"spec\.stages\.list.*without a gap or an overlap"),
    ("a first stage that is not at 0", {"spec.stages": {"list": [stage("a", 1, 10)]}}, r"spec\.stages\.list.*must begin at layer 0"),
    ("stages that are not in order", {"spec.stages": {"list": [stage("a", 0, 10), stage("c", 15, 20), stage("b", 10, 15)]}},
     r"spec\.stages\.list.*in the order of their layers"),
    ("an empty layer range", {"spec.stages": {"list": [stage("a", 0, 10), stage("b", 10, 10)]}}, r"layers\.end.*must be greater than begin"),
    ("a negative layer", {"spec.stages": {"list": [stage("a", -1, 10)]}}, r"layers\.begin.*greater than or equal to 0"),
    ("two stages of one name", {"spec.stages": {"list": [stage("a", 0, 10), stage("a", 10, 20)]}}, r"spec\.stages\.list\[1\]: Duplicate value"),
    ("a stage name that no pod can have", {"spec.stages": {"list": [stage("Stage_0", 0, 10)]}}, r"spec\.stages\.list\[0\]\.name"),
    ("an environment variable with =", {"spec.stages": {"list": [stage("a", 0, 10, env=[{"name": "A=B"}])]}}, r"env\[0\]\.name.*should match"),
    ("an image that is no text", {"spec.head": {"image": 5}}, r"spec\.head\.image.*must be of type string"),
    ("a misspelt field of a pod", {"spec.head": {"nodeselector": {}}}, r'unknown field "spec\.head\.nodeselector"'),
    ("a quantity that is none", {"spec.head": {"resources": {"limits": {"cpu": "many"}}}}, r"spec\.head\.resources\.limits\.cpu.*should match"),
    ("a volume without a name", {"spec.stages.template": {"volumes": [{"emptyDir": {}}]}}, r"spec\.stages\.template\.volumes\[0\]\.name: Required value"),
    ("a volume of the operator's name", {"spec.stages.template": {"volumes": [{"name": "model", "emptyDir": {}}]}}, r"spec\.stages\.template\.volumes.*operator's own"),
    ("a mount without a path", {"spec.stages": {"list": [stage("a", 0, 10, volumeMounts=[{"name": "v"}])]}}, r"volumeMounts\[0\]\.mountPath: Required value"),
    ("an unknown effect of a toleration", {"spec.head": {"tolerations": [{"effect": "NoRun"}]}}, r"tolerations\[0\]\.effect: Unsupported value"),
    ("Kueue without a queue", {"spec.scheduling": {"gang": "Kueue"}}, r"spec\.scheduling\.queueName: Required value: required with gang Kueue"),
    ("an unknown gang", {"spec.scheduling": {"gang": "Slurm"}}, r"spec\.scheduling\.gang: Unsupported value"),
    ("an unknown topology policy", {"spec.scheduling": {"topologyPolicy": "Maybe"}}, r"spec\.scheduling\.topologyPolicy: Unsupported value"),
    ("RDMA without a resource", {"spec.transport": {"rdma": {}}}, r"spec\.transport\.rdma\.resource: Required value"),
    ("RDMA by a name that is no resource", {"spec.transport": {"rdma": {"resource": "hca"}}}, r"spec\.transport\.rdma\.resource.*should match"),
    ("claims without a name", {"spec.weights": {"mode": "PerStage"}}, r"spec\.weights\.claimPrefix: Required value: required with mode PerStage"),
    ("shards without a size", {"spec.weights": {"mode": "Export"}}, r"spec\.weights\.size: Required value: required with mode Export"),
    ("a size that is none", {"spec.weights": {"mode": "Export", "size": "big"}}, r"spec\.weights\.size.*should match"),
    ("claims that nobody can fill", {"spec.weights": {"mode": "Export", "size": "1Gi", "accessMode": "ReadOnlyMany"}}, r"spec\.weights\.accessMode: Unsupported value"),
    ("an unknown way to have weights", {"spec.weights": {"mode": "Download"}}, r"spec\.weights\.mode: Unsupported value"),
    ("an unknown rollout", {"spec.rollout": {"strategy": "Canary"}}, r"spec\.rollout\.strategy: Unsupported value"),
    ("no time to start", {"spec.restart": {"startupTimeoutSeconds": 59}}, r"spec\.restart\.startupTimeoutSeconds.*greater than or equal to 60"),
    ("no memory", {"spec.stages.gpuMemoryGB": 0}, r"spec\.stages\.gpuMemoryGB.*greater than or equal to 1"),
    ("an unknown balance", {"spec.stages.balance": "Fair"}, r"spec\.stages\.balance: Unsupported value"),
    ("17 GPUs a stage", {"spec.stages.gpusPerStage": 17}, r"spec\.stages\.gpusPerStage.*less than or equal to 16"),
    ("NCCL without GPUs", {"spec.transport": {"type": "NCCL"}, "spec.engine": {"device": "Cpu"}}, r"spec\.transport.*NCCL needs spec\.engine\.device Cuda"),
    ("an unknown transport", {"spec.transport": {"type": "RDMA"}}, r"spec\.transport\.type: Unsupported value"),
    ("fewer tokens a step than sequences", {"spec.engine": {"maxBatchTokens": 128}}, r"spec\.engine\.maxBatchTokens.*at least maxSequences"),
    ("blockTokens 0", {"spec.engine": {"blockTokens": 0}}, r"spec\.engine\.blockTokens.*greater than or equal to 1"),
    ("port 65536", {"spec.server": {"port": 65536}}, r"spec\.server\.port.*less than or equal to 65535"),
    ("a restart budget below 0", {"spec.restart": {"budget": -1}}, r"spec\.restart\.budget.*greater than or equal to 0"),
    ("no back-off", {"spec.restart": {"backoffSeconds": 0}}, r"spec\.restart\.backoffSeconds.*greater than or equal to 1"),
    ("replicas -1", {"spec.replicas": -1}, r"spec\.replicas.*greater than or equal to 0"),
    ("a 41-letter name", {"metadata.name": "q" * 41}, r"metadata\.name must be at most 40 characters"),
    ("a name with a dot", {"metadata.name": "a.b"}, r"metadata\.name must be lower-case letters"),
    ("a name that no Service can have", {"metadata.name": "235b"}, r"metadata\.name must .*begin with a letter"),
    ("a wait before SIGTERM of an hour", {"spec.server": {"preStopSeconds": 3600}}, r"spec\.server\.preStopSeconds.*less than or equal to 300"),
    ("an unknown network policy", {"spec.networkPolicy": "Open"}, r'spec\.networkPolicy: Unsupported value: "Open"'),
    ("a misspelt field", {"spec.engine": {"maxSequence": 4}}, r'unknown field "spec\.engine\.maxSequence"'),
]

DEFAULTS = {
    "model": {"id": "m", "source": {"path": "/models/m"}, "dtype": "Auto"},
    "stages": {"count": 2, "balance": "Time", "gpusPerStage": 1},
    "transport": {"type": "Auto"},
    "engine": {"device": "Cuda", "blockTokens": 16, "maxBatchTokens": 2048, "maxSequences": 256, "queueLimit": 1024},
    "server": {"port": 8000, "drainTimeoutSeconds": 60, "preStopSeconds": 5},
    "restart": {"budget": 5, "backoffSeconds": 10, "stallTimeoutSeconds": 10},
    "rollout": {"strategy": "Surge", "surgeTimeoutSeconds": 120},
    "weights": {"mode": "Shared", "accessMode": "ReadWriteOnce"},
    "scheduling": {"gang": "None", "topologyPolicy": "Preferred"},
    "networkPolicy": "Managed",
    "replicas": 1,
    "suspend": False,
}


def changed(manifest, changes):
    manifest = copy.deepcopy(manifest)
    for path, value in changes.items():
        *parents, last = path.split(".")
        at = manifest
        for name in parents:
            at = at.setdefault(name, {})
        if value is DROP:
            at.pop(last, None)
        else:
            at[last] = value
    return manifest


class Suite:
    def __init__(self, cluster):
        self.cluster, self.passed, self.failed = cluster, 0, 0

    def check(self, what, ok, detail=""):
        self.passed, self.failed = self.passed + bool(ok), self.failed + (not ok)
        print(("ok    " if ok else "FAILED") + " " + what + ("" if ok else f": {detail}"), flush=True)

    def call(self, method, path, body=None, content_type="application/json"):
        """(HTTP status, answer as an object)"""
        request = urllib.request.Request(self.cluster.server + path, method=method, data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": content_type})
        try:
            with self.cluster.opener().open(request, timeout=20) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def kubectl(self, *args):
        done = subprocess.run([kube.binaries() / "kubectl", "--kubeconfig", self.cluster.dir / "admin.kubeconfig", *args], capture_output=True,
                              text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def run(self):
        collection = "/apis/qwenpipeline.dev/v1alpha1/namespaces/default/qwenpipelines"
        code, text = self.kubectl("apply", "-f", str(ROOT / "crds/qwenpipeline.yaml"))
        self.check("the resource definition is accepted", code == 0, text)
        for _ in range(40):  # kubectl fails at once on one that has no conditions yet
            code, text = self.kubectl("wait", '--for=jsonpath={.status.conditions[?(@.type=="Established")].status}=True', "--timeout=20s", "crd/qwenpipelines.qwenpipeline.dev")
            if code == 0:
                break
            time.sleep(0.5)
        self.check("and established", code == 0, text)
        _, crd = self.call("GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev")
        states = {c["type"]: c["status"] for c in crd["status"]["conditions"]}
        self.check("its schema is structural", states.get("NonStructuralSchema", "False") == "False", states)

        strict = collection + "?dryRun=All&fieldValidation=Strict"
        for what, changes, refusal in CASES:
            status, answer = self.call("POST", strict, changed(BASE, changes))
            if refusal is None:
                self.check(f"accepts {what}", status == 201, answer.get("message"))
            else:
                self.check(f"refuses {what}", status in (400, 422) and re.search(refusal, answer["message"]), f"{status} {answer.get('message')}")

        for example in sorted((ROOT / "docs/examples").glob("*.yaml")):
            code, text = self.kubectl("create", "--dry-run=server", "-f", str(example))
            self.check(f"accepts docs/examples/{example.name}", code == 0, text)

        status, made = self.call("POST", collection, BASE)
        self.check("fills in every default", made.get("spec") == DEFAULTS, json.dumps(made.get("spec") or made))
        self.check("does not take a status from a creation", "status" not in made)
        status, scale = self.call("GET", collection + "/q/scale")
        self.check("has a scale subresource", scale.get("spec") == {"replicas": 1}, scale)
        self.call("PATCH", collection + "/q/scale", {"spec": {"replicas": 3}}, "application/merge-patch+json")
        _, scaled = self.call("GET", collection + "/q")
        self.check("is scaled through it", scaled["spec"]["replicas"] == 3 and scaled["metadata"]["generation"] == 2, scaled)

        condition = {"type": "Ready", "status": "False", "reason": "InsufficientCapacity", "message": "stage 1 is Pending: no GPUs",
                     "observedGeneration": 2, "lastTransitionTime": "2026-01-01T00:00:00Z"}
        status, answer = self.call("PATCH", collection + "/q/status", {"status": {"observedGeneration": 2, "replicas": 1, "readyReplicas": 0, "stages": "1/2",
                                   "epoch": 4, "restarts": 2, "selector": "a=b", "conditions": [condition]}}, "application/merge-patch+json")
        self.check("takes a status", status == 200 and answer["status"]["conditions"] == [condition], answer)
        self.check("and does not count it as a change of the spec", answer["metadata"]["generation"] == 2)
        bad = {"status": {"conditions": [{**condition, "status": "Maybe"}]}}
        status, answer = self.call("PATCH", collection + "/q/status", bad, "application/merge-patch+json")
        self.check("refuses a condition that is neither True, False nor Unknown", status == 422, answer)
        _, scale = self.call("GET", collection + "/q/scale")
        self.check("tells an autoscaler its selector", scale["status"] == {"replicas": 1, "selector": "a=b"}, scale)

        _, text = self.kubectl("get", "qp")
        self.check("has the columns that people look for", re.search(r"NAME +READY +REASON +STAGES +REPLICAS +RESTARTS +AGE", text), text)
        self.check("and shows the reason", re.search(r"q +False +InsufficientCapacity +1/2 +0 +2", text), text)
        _, text = self.kubectl("get", "qwen")
        self.check("is in the category qwen", "InsufficientCapacity" in text, text)
        _, text = self.kubectl("explain", "qp.spec.stages.count")
        self.check("explains its fields", "Number of stages" in text, text)


def main():
    with tempfile.TemporaryDirectory(prefix="crd_test.") as folder:
        cluster = kube.Cluster(os.path.join(folder, "cluster"))
        try:
            cluster.start([], [])
            cluster.stop_after(os.getpid())
            suite = Suite(cluster)
            suite.run()
        finally:
            cluster.stop()
    print(f"{suite.passed} passed, {suite.failed} failed")
    return 1 if suite.failed else 0


if __name__ == "__main__":
    sys.exit(main())

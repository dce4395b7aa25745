"""What the tests with real pods share: images of this build, a cluster of real nodes, the operator installed by helm as
docs/install.md says, the digits pipeline on it, and a watch that goes on beside every story (Invariants).

Run by ctest with E2E_PROGRAMS="HEAD STAGE CONTROLLER" and TORCH_SITE in the environment.
"""
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/cluster"), str(ROOT / "tests/chart"), str(ROOT / "tests")]
import cluster as kube  # noqa: E402
import image  # noqa: E402
import nodes as real  # noqa: E402
from digits import DIRECT, pictures, question  # noqa: E402
from helm_chart import CHART, tool  # noqa: E402

SLOWNESS = float(os.environ.get("SLOWNESS", "1"))  # of programs that are built with a sanitizer: every limit is so much longer
PATIENCE_S = 120  # a machine that compiles beside the test; what is asserted about speed has its own limit
PROXY_S = 30  # for kube-proxy to hear of a pod on such a machine; an idle one needs less than one
VERSION, NEXT = "0.1.0", "0.1.1"  # the chart's appVersion, which is the tag that it asks for; and the same images under a tag to upgrade to
SKIPPED = 77  # ctest's SKIP_RETURN_CODE of these tests
PIPELINES = "/apis/qwenpipeline.dev/v1alpha1"
OWNED = "pods,services,secrets,networkpolicies,poddisruptionbudgets,jobs,configmaps,endpointslices"


def capable_or_exit():
    """A machine that cannot have nodes fails these tests and says why; whoever knows that may leave them out by name."""
    missing = real.what_is_missing()
    if not missing:
        return
    print(f"this machine cannot run Kubernetes nodes: {missing}")
    if os.environ.get("QWEN_E2E") == "skip":
        print("QWEN_E2E=skip: left out")
        sys.exit(SKIPPED)
    sys.exit("set QWEN_E2E=skip to leave out the tests that need them")


def make_images(folder):
    """Archives of the product's images out of this build, made as the Dockerfiles make them; kept while the programs stay the same."""
    head, stage, controller = map(Path, os.environ["E2E_PROGRAMS"].split())
    rootfs = ROOT / "dockerfiles/rootfs.sh"
    made = []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for program, command in [(head, [rootfs, "ROOT", head]), (controller, [rootfs, "ROOT", controller]),
                                 (stage, [ROOT / "dockerfiles/stage_rootfs.sh", "cpu", "ROOT", stage.parents[1], os.environ["TORCH_SITE"]])]:
            out = folder / f"{program.name}.tar"
            made.append(out)
            if out.exists() and out.stat().st_mtime > program.stat().st_mtime:
                continue
            root = folder / f"{program.name}.root"
            shutil.rmtree(root, ignore_errors=True)
            subprocess.run([str(root) if c == "ROOT" else str(c) for c in command], check=True, capture_output=True, text=True)
            image.archive(out, [f"localhost/{program.name}:{tag}" for tag in (VERSION, NEXT)], root, user="65532:65532", entrypoint=[f"/usr/local/bin/{program.name}"])
            shutil.rmtree(root)
    return made


def post(url, body, timeout=60):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=timeout) as answer:
        return json.loads(answer.read())


class World:
    """The cluster and what a person does with it. Use as a context; everything is gone afterwards. `nodes` real ones; 0: fake ones,
    where pods are words of the API only and the test brings its operator itself. `look_s`: between two looks of the Invariants."""

    def __init__(self, nodes, look_s=0.25, **invariants):
        self.started = time.monotonic()
        self.passed = self.failed = 0
        self.nodes, self.look_s, self.kept = nodes, look_s, invariants

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="e2e."))
        self.cluster = kube.Cluster(self.folder / "cluster")
        try:
            if self.nodes:
                capable_or_exit()
                images = make_images(Path(os.environ["E2E_PROGRAMS"].split()[1]).parents[1] / "images")
                print(f"images after {time.monotonic() - self.started:.1f} s", flush=True)
                self.cluster.start([], [], self.nodes, images, os.getpid())
            else:
                self.cluster.start(["kube-controller-manager", "kube-scheduler", "fakelet"], [], owner=os.getpid())
                self.cluster.nodes(4)
            self.opener = self.cluster.opener()
            self.invariants = Invariants(self, deletes_fail=not self.nodes, **self.kept)
        except BaseException:
            self.cluster.stop()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        print(f"a cluster after {time.monotonic() - self.started:.1f} s", flush=True)
        return self

    def __exit__(self, kind, value, traceback):
        if self.failed or kind:
            self.dump()
        self.cluster.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        print(f"{self.passed} passed, {self.failed} failed in {time.monotonic() - self.started:.1f} s", flush=True)

    def dump(self):
        print("---- what the conditions said", *getattr(getattr(self, "invariants", None), "told", []), sep="\n")
        for arguments in (["get", "qp,pods,services,nodes", "-A", "-o", "wide"], ["get", "qp", "-A", "-o", "yaml"], ["get", "events", "-A", "--sort-by=.lastTimestamp"],
                          ["-n", "qwen-system", "logs", "-l", "app.kubernetes.io/component=controller", "--tail=60", "--prefix"]):
            done = self.kubectl(*arguments, check=False)
            print(f"---- kubectl {' '.join(arguments)}\n{(done.stdout + done.stderr)[-6000:]}")

    # -- checks

    def check(self, what, good, details=""):
        self.passed, self.failed = self.passed + bool(good), self.failed + (not good)
        print(f"{time.monotonic() - self.started:6.1f} {'ok  ' if good else 'FAIL'} {what}" + ("" if good else f": {str(details)[:1500]}"), flush=True)
        return bool(good)

    def within(self, what, limit_s, met, details=lambda: "", patience_s=PATIENCE_S):
        """Waits for met(); it must be true within limit_s. Returns the seconds that it took. Whatever fails meanwhile is not yet true."""
        start, limit_s = time.monotonic(), limit_s * SLOWNESS
        while not (good := self.holds(met)) and time.monotonic() - start < max(limit_s, patience_s):
            time.sleep(0.1)
        took = time.monotonic() - start
        self.check(f"{what} ({took:.1f} s)", good and took <= limit_s, f"limit {limit_s:g} s; {self.attempt(details)}")
        return took

    @staticmethod
    def holds(met):
        try:
            return met()
        except (OSError, KeyError, IndexError, ValueError, subprocess.SubprocessError):
            return False

    @staticmethod
    def attempt(function):
        try:
            return function()
        except Exception as e:  # it only explains a failure
            return repr(e)

    # -- what a person does

    def environment(self):
        return {**os.environ, "KUBECONFIG": str(self.cluster.dir / "admin.kubeconfig"), "HOME": str(self.folder), "NO_PROXY": "*",
                "PATH": f"{self.cluster.binaries}:{Path(tool('helm')).parent}:{os.environ['PATH']}"}

    def kubectl(self, *arguments, check=True, stdin=None, timeout=90):
        return subprocess.run(["kubectl", *map(str, arguments)], input=stdin, capture_output=True, text=True, check=check, timeout=timeout, env=self.environment())

    def helm(self, *arguments, timeout=300):
        done = subprocess.run(["helm", *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=self.environment())
        if done.returncode:
            raise OSError(f"helm {' '.join(map(str, arguments))}: {done.stderr}")
        return done.stdout

    def apply(self, *objects):
        self.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, objects)))

    def call(self, path, method="GET", body=None, content_type="application/json"):
        request = urllib.request.Request(self.cluster.server + path, method=method, data=None if body is None else json.dumps(body).encode(),
                                         headers={"Content-Type": content_type})
        with self.opener.open(request, timeout=30) as answer:
            return json.loads(answer.read())

    def install(self, *more):
        self.helm("upgrade", "--install", "qwen", CHART, "--namespace", "qwen-system", "--create-namespace", "--set", "images.controller.repository=localhost/qwen-controller",
                  "--set", "images.head.repository=localhost/qwen-head", "--set", "images.stage.repository=localhost/qwen-stage", *more)
        self.kubectl("-n", "qwen-system", "rollout", "status", "deployment/qwen-qwen-pipeline", "--timeout=240s", timeout=250)

    def define(self):
        """The resource definition alone, without an operator. kubectl wait fails on one that has no conditions yet."""
        self.kubectl("apply", "-f", ROOT / "crds/qwenpipeline.yaml")
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev"
        self.within("the definition is established", PATIENCE_S, lambda: any(c["type"] == "Established" and c["status"] == "True" for c in self.call(path)["status"].get("conditions") or []))

    def namespace(self, name, **labels):
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})

    def claim(self, namespace, name, checkpoint):
        """A read-only claim bound to a folder that every node has."""
        folder = self.folder / "models" / f"{namespace}-{name}"
        if not folder.exists():
            shutil.copytree(checkpoint, folder)
            subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
        self.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{namespace}-{name}"},
                    "spec": {**common, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(folder), "type": "Directory"},
                             "claimRef": {"namespace": namespace, "name": name}}},
                   {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": namespace},
                    "spec": {**common, "volumeName": f"{namespace}-{name}", "resources": {"requests": {"storage": "1Gi"}}}})
        self.kubectl("-n", namespace, "wait", "--for=jsonpath={.status.phase}=Bound", f"pvc/{name}", f"--timeout={PATIENCE_S}s", timeout=PATIENCE_S + 10)
        return folder

    @staticmethod
    def manifest(namespace, name, stages, **spec):
        return {"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": name, "namespace": namespace}, "spec": {
            "model": {"id": "digits", "source": {"persistentVolumeClaim": {"claimName": "digits"}}, "maxModelLen": 2048}, "stages": {"count": stages},
            "engine": {"device": "Cpu", "maxSequences": 16, "maxBatchTokens": 512, "threads": 1}, **spec}}

    def patch(self, namespace, name, **spec):
        self.kubectl("-n", namespace, "patch", "qp", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    # -- what a person sees

    def pipeline(self, namespace, name):
        return self.call(f"{PIPELINES}/namespaces/{namespace}/qwenpipelines/{name}")

    def condition(self, namespace, name, kind="Ready"):
        conditions = self.pipeline(namespace, name).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {"status": "", "reason": "", "message": ""})

    def ready(self, namespace, name, after_epoch=-1):
        """It serves what its newest spec says, under a higher epoch than `after_epoch`: all read at once, since two reads may meet two states."""
        now = self.pipeline(namespace, name)
        good = any(c["type"] == "Ready" and c["status"] == "True" for c in now["status"]["conditions"])
        return good and now["status"]["observedGeneration"] == now["metadata"]["generation"] and now["status"].get("epoch", 0) > after_epoch

    def pods(self, namespace, name):
        listed = self.call(f"/api/v1/namespaces/{namespace}/pods?labelSelector=qwenpipeline.dev/pipeline%3D{name}")["items"]
        return {pod["metadata"]["name"]: pod for pod in listed}

    def living(self, namespace, name):
        """Names of its pods that are not being deleted and have not ended."""
        return sorted(n for n, p in self.pods(namespace, name).items() if "deletionTimestamp" not in p["metadata"] and p["status"].get("phase") in ("Pending", "Running"))

    def epoch(self, namespace, name):
        return self.pipeline(namespace, name)["status"]["epoch"]

    def ask(self, namespace, name, file, node=None, timeout=60):
        """The answer through the Service, from a node of the cluster."""
        address = self.call(f"/api/v1/namespaces/{namespace}/services/{name}")["spec"]["clusterIP"]
        node = node or next(n for n in self.cluster.nodes_of() if self.cluster.pid(n.name))
        answer = node.inside(lambda: post(f"http://{address}:8000/v1/chat/completions", question(file), timeout))
        return answer["choices"][0]["message"]["content"]

    def answers_right(self, namespace, name, count=3, node=None):
        """[] when the first `count` pictures are answered as transformers does; else what is wrong.

        A node refuses a Service's connections until its kube-proxy has heard that a pod is ready: that is waited for.
        """
        wrong, patience = [], time.monotonic() + PROXY_S
        for file, expected in pictures()[:count]:
            while True:
                try:
                    answer = self.ask(namespace, name, file, node)
                except (OSError, ValueError, KeyError) as e:
                    answer = repr(e)
                if "Connection refused" not in answer or time.monotonic() > patience:
                    break
                time.sleep(0.2)
            if answer != expected:
                wrong.append((file.name, expected, answer))
        return wrong

    def answers(self, what, namespace, name, count=3):
        wrong = self.answers_right(namespace, name, count)
        self.check(what, not wrong, wrong)

    def processes(self, program="qwen-head|qwen-stage"):
        """[(node, pid, environment)] of what really runs on the nodes, whatever the API says."""
        return [(node, pid, env) for node in self.cluster.nodes_of() if self.cluster.pid(node.name) for pid, env in node.programs(program)]

    def process(self, pod):
        """(node, pid) of a pod's program."""
        found = [(node, pid) for node, pid, env in self.processes() if env.get("QWEN_POD_NAME") == pod]
        if not found:
            raise KeyError(f"{pod} has no process")
        return found[0]

    def left(self, namespace, name):
        """Whatever still bears the pipeline's label, and processes."""
        listed = json.loads(self.kubectl("-n", namespace, "get", OWNED, "-l", f"qwenpipeline.dev/pipeline={name}", "-o", "json").stdout)["items"]
        return [f"{o['kind']}/{o['metadata']['name']}" for o in listed] + \
               [f"process {pid} of {env['QWEN_POD_NAME']}" for _, pid, env in self.processes() if env.get("QWEN_POD_NAME", "").startswith(f"{name}-")]


class Asker:
    """Asks the digits of a pipeline through its Service, again and again. Refused is allowed while something is broken; wrong never is.
    `timeout`: after which no answer is a refusal. Of a node that was cut off nothing comes, not even that."""

    def __init__(self, world, namespace, name, timeout=5):
        self.world, self.namespace, self.name, self.timeout = world, namespace, name, timeout
        self.right, self.refused, self.wrong, self.last = 0, [], [], 0.0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        asked = pictures()
        while not self.ended.wait(0.2):
            file, expected = asked[(self.right + len(self.refused)) % len(asked)]
            try:
                answer = self.world.ask(self.namespace, self.name, file, timeout=self.timeout)
            except (OSError, ValueError, KeyError, StopIteration) as e:
                self.refused.append(f"{time.monotonic() - self.world.started:.1f} {e!r}")
                continue
            if answer == expected:
                self.right, self.last = self.right + 1, time.monotonic()
            else:
                self.wrong.append((file.name, expected, answer))

    def end(self, may_refuse):
        self.ended.set()
        self.thread.join()
        self.world.check(f"{self.right} answers meanwhile, {len(self.refused)} refused, none wrong", self.right > 5 and not self.wrong and (may_refuse or not self.refused),
                         self.wrong or self.refused)


class Invariants:
    """Looks on from a thread of its own for as long as the world stands: at the API's pods and at the nodes' processes.

    1. A name of a pod, which carries the epoch, is given once: nothing of an epoch is ever made again. With `forming_repeats`: once the
       group stood; one that still grows may get a pod again that somebody else deleted.
    2. Of a replica at most two groups have all their pods Ready: in a surge the new revision stands beside the old one until that has
       drained. Unless `deletes_fail`: then older groups may stand, each whole; the next one waits for nobody.
    3. No two processes run for one pod's name, on whatever node, cut off or not: no two groups of one epoch serve.
    """

    def __init__(self, world, deletes_fail=False, forming_repeats=False):
        self.world, self.deletes_fail, self.forming_repeats, self.broken, self.looks = world, deletes_fail, forming_repeats, [], 0
        self.formed = set()  # (pipeline uid, replica, epoch) of groups that were complete once, as the status says
        self.uids = {}  # (pipeline uid, pod name) -> uid of the pod
        self.told = []  # (seconds, pipeline, Ready, reason, message) whenever that changes: the story, for whoever looks for a fault
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.ended.wait(self.world.look_s):
            try:
                self.look_at_pods()
                self.listen()
                self.looks += 1
            except (OSError, ValueError):
                pass  # the API server is away, as some stories want it
            try:
                self.look_at_processes()
            except OSError:
                pass  # a node went off under our eyes

    def note(self, text):
        if text not in self.broken:
            self.broken.append(text)

    def look_at_pods(self):
        groups = {}
        for pod in self.world.call("/api/v1/pods?labelSelector=qwenpipeline.dev/epoch")["items"]:
            meta = pod["metadata"]
            labels, owner = meta["labels"], meta["ownerReferences"][0]["uid"]
            replica, group = labels["qwenpipeline.dev/replica"], labels["qwenpipeline.dev/group"]
            stood = (owner, replica, group) in self.formed
            if self.uids.get((owner, meta["name"]), meta["uid"]) != meta["uid"] and (stood or not self.forming_repeats):
                self.note(f"{meta['namespace']}/{meta['name']} was made twice, again at {time.monotonic() - self.world.started:.1f} s by {meta['creationTimestamp']}")
            self.uids[owner, meta["name"]] = meta["uid"]
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", [])) and "deletionTimestamp" not in meta
            groups.setdefault((owner, replica), {}).setdefault(group, []).append(ready)
        for (_, replica), of_replica in groups.items():
            whole = [group for group, pods in of_replica.items() if len(pods) > 1 and all(pods)]
            if len(whole) > 2 and not self.deletes_fail:
                self.note(f"replica {replica} is Ready as the groups {whole}")

    def listen(self):
        for pipeline in self.world.call(f"{PIPELINES}/qwenpipelines")["items"]:
            name = f"{pipeline['metadata']['namespace']}/{pipeline['metadata']['name']}"
            self.formed.update((pipeline["metadata"]["uid"], str(group["replica"]), str(group["epoch"]))
                               for group in pipeline.get("status", {}).get("groups") or [] if group["phase"] == "Formed")
            ready = next((c for c in pipeline.get("status", {}).get("conditions", []) if c["type"] == "Ready"), {})
            now = (name, ready.get("status"), ready.get("reason"), ready.get("message"))
            if now != next((t[1:] for t in reversed(self.told) if t[1] == name), None):
                self.told.append((round(time.monotonic() - self.world.started, 1), *now))

    def look_at_processes(self):
        seen = {}
        for node, pid, env in self.world.processes():
            key = (env.get("QWEN_PIPELINE_UID"), env.get("QWEN_POD_NAME"))
            if key in seen:
                self.note(f"{key[1]} runs twice: {seen[key]} and process {pid} on {node.name}")
            seen[key] = f"process {pid} on {node.name}"

    def end(self):
        self.ended.set()
        self.thread.join()
        self.world.check(f"at no time two groups of one epoch, seen {self.looks} times", self.looks > 20 and not self.broken, self.broken)

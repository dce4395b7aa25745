#!/usr/bin/env python3
"""The life of a pipeline on a real cluster, as docs/install.md tells it: helm install, kubectl apply, right answers through four stage
pods, every kind of trouble named in the condition, two replicas, an upgrade, suspended, resumed, deleted without a trace.

Real kubelets run the images of this build; what is asserted is what a person sees: kubectl's columns, conditions, events, answers.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from history import History
from world import NEXT, ROOT, Asker, World, pictures, post, question

NAMED_S = 5  # from the moment that the cluster says it of a pod to the pipeline's condition, both as the API server told them
MADE_S = 10  # from the manifest to its pods
SOON_S = 120  # for what this test waits for without a claim about its speed
NS = "models"


def took(world, what, limit_s, fact, consequence, details):
    """Both happen, and from fact() to consequence(), moments in the history, no more than limit_s pass."""
    until = time.monotonic() + 2 * SOON_S
    while None in (moments := (fact(), consequence())) and time.monotonic() < until:
        time.sleep(0.1)
    if None in moments:
        return world.check(f"{what}: {'it did not come to that' if moments[0] is None else 'nothing followed'}", False, world.attempt(details))
    delay = moments[1] - moments[0]
    return world.check(f"{what}: {delay:.2f} s later", delay <= limit_s, f"limit {limit_s} s")


def named(world, what, namespace, name, reason, pattern, fact, since):
    """The condition Ready says `reason`, with a message that matches, at most NAMED_S after a pod, or with `fact` None the pipeline, was so."""
    said = world.history

    def begin():
        return said.pod(namespace, name, fact, since) if fact else said.pipeline(namespace, name, lambda pipeline: True, since)
    took(world, f"{what}: told as {reason or 'what it waits for'}", NAMED_S, begin, lambda: said.named(namespace, name, reason, pattern, since), lambda: world.condition(namespace, name))


def container(pod):
    return (pod["status"].get("containerStatuses") or [{}])[0]


def waits_for(*reasons):
    return lambda pod: container(pod).get("state", {}).get("waiting", {}).get("reason") in reasons


def ended_with(code):
    return lambda pod: container(pod).get("state", {}).get("terminated", {}).get("exitCode") == code


def unscheduled(pod):
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in pod["status"].get("conditions", []))


def epoch_of(*epochs):
    return lambda pod: pod["metadata"]["labels"]["qwenpipeline.dev/epoch"] in map(str, epochs)


@contextmanager
def forwarded(world, namespace, service, port):
    """kubectl port-forward, as in docs/install.md, but from whatever port of this machine is free."""
    process = subprocess.Popen(["kubectl", "-n", namespace, "port-forward", f"service/{service}", f":{port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=world.environment())
    try:
        said = []
        while not (local := re.match(r"Forwarding from 127\.0\.0\.1:(\d+)", said[-1] if said else "")):
            said.append(process.stdout.readline())
            if not said[-1]:
                raise OSError(f"kubectl port-forward: {said}")
        yield f"http://127.0.0.1:{local[1]}"
    finally:
        process.kill()
        process.wait()


def install(world):
    world.install()
    deployed = json.loads(world.kubectl("-n", "qwen-system", "get", "deployment", "qwen-qwen-pipeline", "-o", "json").stdout)
    world.check("helm install: two operators are Ready", deployed["status"].get("readyReplicas") == 2, deployed["status"])
    world.namespace(NS, **{"pod-security.kubernetes.io/enforce": "restricted"})
    world.claim(NS, "digits", ROOT / "docs/examples/digits-checkpoint")


def first_answer(world):
    said, since = world.history, time.monotonic()
    world.kubectl("-n", NS, "apply", "-f", ROOT / "docs/examples/digits.yaml")
    named(world, "the laptop's manifest: its relative path", NS, "digits", "InvalidSpec", "spec.model.source.path", None, since)
    world.patch(NS, "digits", model={"source": {"path": None, "persistentVolumeClaim": {"claimName": "digits"}}}, engine={"threads": 1}, restart={"backoffSeconds": 2},
                server={"drainTimeoutSeconds": 10})
    pods = ["digits-0-head-1"] + [f"digits-0-stage-{k}-1" for k in range(4)]
    took(world, "with a claim: five pods of the restricted profile", MADE_S, lambda: said.pipeline(NS, "digits", lambda p: p["metadata"]["generation"] == 2, since),
         lambda: said.pods_made(NS, pods, since), lambda: world.condition(NS, "digits"))
    named(world, "a pod that is not ready", NS, "digits", "", r"pod digits-0-(head|stage-\d)-1\b", epoch_of(1), since)
    waiting = world.kubectl("-n", NS, "wait", "--for=condition=Ready", "qp/digits", "--timeout=240s", check=False, timeout=250)
    world.check("kubectl wait --for=condition=Ready", waiting.returncode == 0, waiting.stderr)

    def columns():
        titles, values = world.kubectl("-n", NS, "get", "qp").stdout.splitlines()[:2]
        return dict(zip(titles.split(), values.split()))
    right = {"NAME": "digits", "READY": "True", "REASON": "AllReplicasReady", "STAGES": "4/4", "RESTARTS": "0"}
    world.within("kubectl get qp shows it", SOON_S, lambda: right.items() <= columns().items(), columns)

    def described():
        return world.kubectl("-n", NS, "describe", "qp", "digits").stdout
    world.within("kubectl describe tells its beginning", SOON_S, lambda: "GroupCreated" in (text := described()) and "under epoch 1" in text, lambda: described()[-1500:])
    nodes = {p["spec"]["nodeName"] for p in world.pods(NS, "digits").values()}

    def answers():
        with forwarded(world, NS, "digits", 8000) as url:
            return [(post(f"{url}/v1/chat/completions", question(file))["choices"][0]["message"]["content"], right) for file, right in pictures()[:8]]
    given = []
    world.within("kubectl port-forward leads to the head", SOON_S, lambda: given.extend(answers()) or given, answers)
    world.check(f"through it and pods on {len(nodes)} nodes every digit is answered as transformers does", given and all(answer == right for answer, right in given), given)
    logs = lambda: [world.kubectl("-n", NS, "logs", pod).stdout for pod in world.living(NS, "digits")]  # noqa: E731
    world.within("kubectl logs shows a line of each pod", SOON_S, lambda: all(logs()), logs)

    def qwenctl(*words):
        program = Path(os.environ["E2E_PROGRAMS"].split()[0]).with_name("qwenctl")
        return subprocess.run([program, *words, "digits", "-n", NS, "--kubeconfig", world.cluster.dir / "admin.kubeconfig"], capture_output=True, text=True, timeout=60)
    told = qwenctl("logs")
    world.check("qwenctl logs shows lines of every pod with its name", told.returncode == 0 and all(re.search(f"^{pod}  .", told.stdout, re.M) for pod in pods),
                (told.returncode, told.stdout[-800:], told.stderr))
    told = qwenctl("logs", "--stage", "2")
    world.check("or of one", told.returncode == 0 and told.stdout and set(line.split()[0] for line in told.stdout.splitlines()) == {"digits-0-stage-2-1"}, told)
    told = qwenctl("status")
    world.check("qwenctl status says that it is Ready", told.returncode == 0 and "Ready=True" in told.stdout, told)


def trouble(world):
    """Pipelines that cannot be, beside the one that serves."""
    since = time.monotonic()
    world.apply(world.manifest(NS, "gpu", 1, engine={"device": "Cuda"}))
    torn = world.claim(NS, "torn", ROOT / "docs/examples/digits-checkpoint")
    config = json.loads((torn / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    config["text_config"]["moe_intermediate_size"] *= 2
    (torn / "config.json").write_text(json.dumps(config))
    bad = world.manifest(NS, "bad", 1)
    bad["spec"]["model"]["source"]["persistentVolumeClaim"]["claimName"] = "torn"
    world.apply(bad)
    world.namespace("tight")
    world.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few", "namespace": "tight"}, "spec": {"hard": {"pods": "1"}}})
    world.claim("tight", "digits", ROOT / "docs/examples/digits-checkpoint")
    world.within("a quota is in force", SOON_S, lambda: world.call("/api/v1/namespaces/tight/resourcequotas/few")["status"].get("hard"))
    world.apply(world.manifest("tight", "many", 2))
    named(world, "a quota that is too small", "tight", "many", "QuotaExceeded", "exceeded quota: few", None, since)
    named(world, "no GPU in the cluster", NS, "gpu", "Unschedulable", r"pod gpu-0-stage-0-1.*nvidia\.com/gpu", unscheduled, since)
    named(world, "a checkpoint that does not fit its config", NS, "bad", "GaveUp", r"pod bad-0-stage-0-1 ended: exit code 65 \(bad checkpoint\)", ended_with(65), since)
    world.within("which is final: Failed", NAMED_S, lambda: world.condition(NS, "bad", "Failed")["status"] == "True", lambda: world.condition(NS, "bad", "Failed"))
    log = lambda: world.kubectl("-n", NS, "logs", "bad-0-stage-0-1").stdout  # noqa: E731
    world.within("and its pod is kept: its log names the tensor", SOON_S, lambda: re.search(r"model\.\S*(mlp|experts)\S*", log()), lambda: log()[-800:])
    world.kubectl("-n", NS, "delete", "qp", "gpu", "bad", "--wait=false")
    world.kubectl("-n", "tight", "delete", "qp", "many", "--wait=false")
    world.answers("beside all this digits serves", NS, "digits", 1)


def crash_loop(world):
    said = world.history
    for epoch in (1, 2):
        pod, since = f"digits-0-stage-1-{epoch}", time.monotonic()
        world.within(f"{pod} runs", SOON_S, lambda: world.process(pod))
        os.kill(world.process(pod)[1], signal.SIGKILL)
        if epoch == 1:
            took(world, "a stage is killed: it is made again", NAMED_S, lambda: said.pod(NS, "digits", ended_with(137), since),
                 lambda: said.pods_made(NS, ["digits-0-stage-1-2"], since), lambda: world.living(NS, "digits"))
    named(world, "killed again", NS, "digits", "CrashLoop", r"pod digits-0-stage-1-2 ended: exit code 137", lambda p: epoch_of(2)(p) and ended_with(137)(p), since)
    world.within("after its back-off it serves again", SOON_S, lambda: world.ready(NS, "digits", 2) and world.epoch(NS, "digits") == 3, lambda: world.condition(NS, "digits"))
    world.answers("with right answers", NS, "digits")
    row = world.kubectl("-n", NS, "get", "qp", "digits", "--no-headers").stdout.split()
    world.check("kubectl get qp counts two restarts", "2" in row, row)


def upgrade(world):
    since, next_epoch = time.monotonic(), world.epoch(NS, "digits") + 1
    world.install("--set", "images.stage.tag=absent")
    named(world, "an upgrade to an image that is not there", NS, "digits", "ImagePullFailed", rf"pod digits-0-stage-\d-{next_epoch}: (ErrImagePull|ImagePullBackOff).*qwen-stage:absent",
          waits_for("ErrImagePull", "ImagePullBackOff"), since)
    world.answers("and the revision before serves on", NS, "digits")
    asker = Asker(world, NS, "digits", timeout=60)
    world.install("--set", f"images.stage.tag={NEXT}")
    world.within("upgraded to one that is: it serves", SOON_S, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))
    world.within("and nothing of the others is left", SOON_S, lambda: len(world.pods(NS, "digits")) == 5, lambda: world.living(NS, "digits"))
    images = {p["spec"]["containers"][0]["image"] for n, p in world.pods(NS, "digits").items() if "stage" in n}
    world.check("with the image that was asked for", images == {f"localhost/qwen-stage:{NEXT}"}, images)
    asker.end(may_refuse=False)


def scale(world):
    world.kubectl("-n", NS, "scale", "qp", "digits", "--replicas=2")
    world.within("scaled to 2: both serve", SOON_S, lambda: world.ready(NS, "digits") and world.pipeline(NS, "digits")["status"]["readyReplicas"] == 2, lambda: world.condition(NS, "digits"))
    heads = [p["status"]["podIP"] for n, p in world.pods(NS, "digits").items() if "-head-" in n]
    file, right = pictures()[0]
    ask = lambda: [post(f"http://{ip}:8000/v1/chat/completions", question(file))["choices"][0]["message"]["content"] for ip in heads]  # noqa: E731
    given = []
    world.within("the two heads can be asked", SOON_S, lambda: given.extend(ask()) or given, ask)
    world.check("and each answers right", given == [right, right], given)

    def addresses():
        slices = world.call(f"/apis/discovery.k8s.io/v1/namespaces/{NS}/endpointslices?labelSelector=kubernetes.io/service-name%3Ddigits")["items"]
        return {a for s in slices for e in s.get("endpoints") or [] for a in e["addresses"]}
    world.within("both stand behind the Service", SOON_S, lambda: addresses() == set(heads), lambda: (addresses(), heads))


def sleep_and_wake(world):
    epochs = world.epoch(NS, "digits")
    world.patch(NS, "digits", suspend=True)
    world.within("suspended: nothing runs", SOON_S, lambda: not world.pods(NS, "digits") and world.condition(NS, "digits")["reason"] == "Suspended" and
                 not [p for _, p, e in world.processes() if e["QWEN_POD_NAME"].startswith("digits-")], lambda: world.condition(NS, "digits"))
    world.patch(NS, "digits", suspend=False, replicas=1)
    world.within("resumed: it serves", SOON_S, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))
    world.check("under an epoch that never was", world.epoch(NS, "digits") > epochs, world.epoch(NS, "digits"))
    world.answers("with right answers", NS, "digits")


def without_operator(world):
    before = {name: pod["metadata"]["uid"] for name, pod in world.pods(NS, "digits").items()}
    world.helm("uninstall", "qwen", "--namespace", "qwen-system", "--wait")
    world.within("the operator is uninstalled: none runs", SOON_S, lambda: not world.processes("qwen-controller"))
    world.answers("and the pipeline serves on", NS, "digits")
    world.install("--set", f"images.stage.tag={NEXT}")
    def leads():
        return world.call("/apis/coordination.k8s.io/v1/namespaces/qwen-system/leases/qwen-controller")["spec"]["holderIdentity"].split("_")[0] in \
            [env["QWEN_POD_NAME"] for _, _, env in world.processes("qwen-controller")]
    world.within("installed again: a new one leads", SOON_S, leads)
    time.sleep(5)  # whatever it would do
    after = {name: pod["metadata"]["uid"] for name, pod in world.pods(NS, "digits").items()}
    world.check("and leaves every pod of it as it was", after == before, (before, after))
    world.within("which still serves", SOON_S, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))


def end(world):
    world.kubectl("-n", NS, "delete", "qp", "digits", f"--timeout={SOON_S}s", timeout=SOON_S + 10)
    for namespace, name in ((NS, "digits"), (NS, "gpu"), (NS, "bad"), ("tight", "many")):
        world.within(f"deleted: nothing is left of {name}", SOON_S, lambda: not world.left(namespace, name), lambda: world.left(namespace, name))
    world.helm("uninstall", "qwen", "--namespace", "qwen-system", "--wait")
    world.within("uninstalled: no operator runs, the definition stays", SOON_S, lambda: not world.processes("qwen-controller") and
                 world.call("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev"))
    world.within("no program of ours runs on any node", SOON_S, lambda: not world.processes(), world.processes)


def main():
    with World(nodes=2) as world:
        world.history = History(world.cluster)
        for step in (install, first_answer, trouble, crash_loop, upgrade, scale, sleep_and_wake, without_operator, end):
            print(f"---- {step.__name__}", flush=True)
            step(world)
        world.invariants.end()
    return 1 if world.failed else 0


if __name__ == "__main__":
    sys.exit(main())

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

from world import NEXT, ROOT, Asker, World, pictures, post, question

NAMED_S = 5  # from the moment that the cluster says it of a pod to the pipeline's condition
NS = "models"


def named(world, what, namespace, name, reason, pattern, fact):
    """The condition Ready says `reason`, with a message that matches, at most NAMED_S after fact() became true."""
    world.within(f"{what}: the cluster notices", 60, fact, lambda: world.pods(namespace, name))
    def told():
        ready = world.condition(namespace, name)
        return ready["status"] == "False" and ready["reason"] == reason and re.search(pattern, ready["message"])
    world.within(f"{what}: named in the condition as {reason}", NAMED_S, told, lambda: world.condition(namespace, name))


def container(pod):
    return (pod["status"].get("containerStatuses") or [{}])[0]


def waits_for(world, namespace, name, reasons):
    return lambda: any(container(p).get("state", {}).get("waiting", {}).get("reason") in reasons for p in world.pods(namespace, name).values())


def ended_with(world, namespace, name, code):
    return lambda: any(container(p).get("state", {}).get("terminated", {}).get("exitCode") == code for p in world.pods(namespace, name).values())


def unscheduled(world, namespace, name):
    return lambda: any(c["type"] == "PodScheduled" and c["status"] == "False" for p in world.pods(namespace, name).values() for c in p["status"].get("conditions", []))


@contextmanager
def forwarded(world, namespace, service, port):
    """kubectl port-forward, as in docs/install.md, but from whatever port of this machine is free."""
    process = subprocess.Popen(["kubectl", "-n", namespace, "port-forward", f"service/{service}", f":{port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env=world.environment())
    try:
        line = process.stdout.readline()
        local = re.match(r"Forwarding from 127\.0\.0\.1:(\d+)", line)
        if not local:
            raise OSError(line)
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
    world.kubectl("-n", NS, "apply", "-f", ROOT / "docs/examples/digits.yaml")
    world.within("the laptop's manifest is applied; its relative path is named", NAMED_S, lambda: world.condition(NS, "digits")["reason"] == "InvalidSpec" and
                 "spec.model.source.path" in world.condition(NS, "digits")["message"], lambda: world.condition(NS, "digits"))
    world.patch(NS, "digits", model={"source": {"path": None, "persistentVolumeClaim": {"claimName": "digits"}}}, engine={"threads": 1}, restart={"backoffSeconds": 2},
                server={"drainTimeoutSeconds": 10})
    world.within("five pods of the restricted profile are made", 10, lambda: len(world.living(NS, "digits")) == 5, lambda: world.condition(NS, "digits"))
    world.within("the condition names a pod that is not ready", NAMED_S, lambda: re.search(r"pod digits-0-(head|stage-\d)-1\b", world.condition(NS, "digits")["message"]),
                 lambda: world.condition(NS, "digits"))
    waiting = world.kubectl("-n", NS, "wait", "--for=condition=Ready", "qp/digits", "--timeout=120s", check=False, timeout=130)
    world.check("kubectl wait --for=condition=Ready", waiting.returncode == 0, waiting.stderr)
    columns = world.kubectl("-n", NS, "get", "qp").stdout.splitlines()
    row = dict(zip(columns[0].split(), columns[1].split()))
    world.check("kubectl get qp shows it", {k: row.get(k) for k in ("NAME", "READY", "REASON", "STAGES", "RESTARTS")} ==
                {"NAME": "digits", "READY": "True", "REASON": "AllReplicasReady", "STAGES": "4/4", "RESTARTS": "0"}, columns)
    described = world.kubectl("-n", NS, "describe", "qp", "digits").stdout
    world.check("kubectl describe tells its beginning", "GroupCreated" in described and "under epoch 1" in described, described[-1500:])
    nodes = {p["spec"]["nodeName"] for p in world.pods(NS, "digits").values()}
    with forwarded(world, NS, "digits", 8000) as url:
        asked = pictures()[:8]
        answers = [post(f"{url}/v1/chat/completions", question(file))["choices"][0]["message"]["content"] for file, _ in asked]
    world.check(f"through kubectl port-forward and pods on {len(nodes)} nodes: every digit is answered as transformers does", answers == [right for _, right in asked],
                list(zip(answers, asked)))
    shown = [world.kubectl("-n", NS, "logs", pod).stdout for pod in world.living(NS, "digits")]
    world.check("kubectl logs shows a line of each pod", all(shown), shown)


def trouble(world):
    """Pipelines that cannot be, beside the one that serves."""
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
    world.within("a quota is in force", 20, lambda: world.call("/api/v1/namespaces/tight/resourcequotas/few")["status"].get("hard"))
    world.apply(world.manifest("tight", "many", 2))
    named(world, "quota", "tight", "many", "QuotaExceeded", "exceeded quota: few", lambda: True)
    named(world, "no GPU in the cluster", NS, "gpu", "Unschedulable", r"pod gpu-0-stage-0-1.*nvidia\.com/gpu", unscheduled(world, NS, "gpu"))
    named(world, "a checkpoint that does not fit its config", NS, "bad", "GaveUp", r"pod bad-0-stage-0-1 ended: exit code 65 \(bad checkpoint\)", ended_with(world, NS, "bad", 65))
    world.check("which is final: Failed", world.condition(NS, "bad", "Failed")["status"] == "True", world.condition(NS, "bad", "Failed"))
    log = world.kubectl("-n", NS, "logs", "bad-0-stage-0-1").stdout
    world.check("and its pod is kept: its log names the tensor", re.search(r"model\.\S*(mlp|experts)\S*", log), log[-800:])
    world.kubectl("-n", NS, "delete", "qp", "gpu", "bad", "--wait=false")
    world.kubectl("-n", "tight", "delete", "qp", "many", "--wait=false")
    world.check("all the while digits serves", world.ready(NS, "digits") and not world.answers_right(NS, "digits", 1), world.answers_right(NS, "digits", 1))


def crash_loop(world):
    for epoch in (1, 2):
        pod = f"digits-0-stage-1-{epoch}"
        world.within(f"{pod} runs", 60, lambda: world.process(pod))
        _, pid = world.process(pod)
        os.kill(pid, signal.SIGKILL)
        if epoch == 1:
            world.within("a stage that is killed: the group begins again", 10, lambda: "digits-0-stage-1-2" in world.living(NS, "digits"), lambda: world.living(NS, "digits"))
    named(world, "killed again", NS, "digits", "CrashLoop", r"pod digits-0-stage-1-2 ended: exit code 137", ended_with(world, NS, "digits", 137))
    world.within("after its back-off it serves again", 60, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))
    world.check("with right answers", not world.answers_right(NS, "digits"), world.answers_right(NS, "digits"))
    row = world.kubectl("-n", NS, "get", "qp", "digits", "--no-headers").stdout.split()
    world.check("kubectl get qp counts two restarts", "2" in row, row)


def upgrade(world):
    world.install("--set", "images.stage.tag=absent")
    named(world, "an upgrade to an image that is not there", NS, "digits", "ImagePullFailed", r"pod digits-0-stage-\d-4: (ErrImagePull|ImagePullBackOff).*qwen-stage:absent",
          waits_for(world, NS, "digits", ("ErrImagePull", "ImagePullBackOff")))
    world.check("and the revision before serves on", not world.answers_right(NS, "digits"), world.answers_right(NS, "digits"))
    asker = Asker(world, NS, "digits")
    world.install("--set", f"images.stage.tag={NEXT}")
    world.within("upgraded to one that is: it serves", 60, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))
    world.within("and nothing of the others is left", 30, lambda: len(world.pods(NS, "digits")) == 5, lambda: world.living(NS, "digits"))
    images = {p["spec"]["containers"][0]["image"] for n, p in world.pods(NS, "digits").items() if "stage" in n}
    world.check("with the image that was asked for", images == {f"localhost/qwen-stage:{NEXT}"}, images)
    asker.end(may_refuse=False)


def scale(world):
    world.kubectl("-n", NS, "scale", "qp", "digits", "--replicas=2")
    world.within("scaled to 2: both serve", 90, lambda: world.ready(NS, "digits") and world.pipeline(NS, "digits")["status"]["readyReplicas"] == 2, lambda: world.condition(NS, "digits"))
    heads = [p["status"]["podIP"] for n, p in world.pods(NS, "digits").items() if "-head-" in n]
    file, right = pictures()[0]
    answers = [post(f"http://{ip}:8000/v1/chat/completions", question(file))["choices"][0]["message"]["content"] for ip in heads]
    world.check("each of the two heads answers right", answers == [right, right], answers)
    slices = world.call(f"/apis/discovery.k8s.io/v1/namespaces/{NS}/endpointslices?labelSelector=kubernetes.io/service-name%3Ddigits")["items"]
    addresses = {a for s in slices for e in s.get("endpoints") or [] for a in e["addresses"]}
    world.check("and both stand behind the Service", addresses == set(heads), (addresses, heads))


def sleep_and_wake(world):
    epochs = world.epoch(NS, "digits")
    world.patch(NS, "digits", suspend=True)
    world.within("suspended: nothing runs", 60, lambda: not world.pods(NS, "digits") and world.condition(NS, "digits")["reason"] == "Suspended" and
                 not [p for _, p, e in world.processes() if e["QWEN_POD_NAME"].startswith("digits-")], lambda: world.condition(NS, "digits"))
    world.patch(NS, "digits", suspend=False, replicas=1)
    world.within("resumed: it serves", 60, lambda: world.ready(NS, "digits"), lambda: world.condition(NS, "digits"))
    world.check("under an epoch that never was", world.epoch(NS, "digits") > epochs, world.epoch(NS, "digits"))
    world.check("with right answers", not world.answers_right(NS, "digits"), world.answers_right(NS, "digits"))


def without_operator(world):
    before = {name: pod["metadata"]["uid"] for name, pod in world.pods(NS, "digits").items()}
    world.helm("uninstall", "qwen", "--namespace", "qwen-system", "--wait")
    world.within("the operator is uninstalled: none runs", 30, lambda: not world.processes("qwen-controller"))
    world.check("and the pipeline serves on", not world.answers_right(NS, "digits"), world.answers_right(NS, "digits"))
    world.install("--set", f"images.stage.tag={NEXT}")
    def leads():
        return world.call("/apis/coordination.k8s.io/v1/namespaces/qwen-system/leases/qwen-controller")["spec"]["holderIdentity"].split("_")[0] in \
            [env["QWEN_POD_NAME"] for _, _, env in world.processes("qwen-controller")]
    world.within("installed again: a new one leads", 30, leads)
    time.sleep(2)
    after = {name: pod["metadata"]["uid"] for name, pod in world.pods(NS, "digits").items()}
    world.check("and leaves every pod of it as it was", after == before and world.ready(NS, "digits"), (before, after))


def end(world):
    world.kubectl("-n", NS, "delete", "qp", "digits", "--timeout=60s")
    for namespace, name in ((NS, "digits"), (NS, "gpu"), (NS, "bad"), ("tight", "many")):
        world.within(f"deleted: nothing is left of {name}", 60, lambda: not world.left(namespace, name), lambda: world.left(namespace, name))
    world.helm("uninstall", "qwen", "--namespace", "qwen-system", "--wait")
    world.within("uninstalled: no operator runs, the definition stays", 30, lambda: not world.processes("qwen-controller") and
                 world.call("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qwenpipelines.qwenpipeline.dev"))
    time.sleep(1)
    world.check("no program of ours runs on any node", not world.processes(), world.processes())


def main():
    with World(nodes=2) as world:
        for step in (install, first_answer, trouble, crash_loop, upgrade, scale, sleep_and_wake, without_operator, end):
            print(f"---- {step.__name__}", flush=True)
            step(world)
        world.invariants.end()
    return 1 if world.failed else 0


if __name__ == "__main__":
    sys.exit(main())

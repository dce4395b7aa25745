#!/usr/bin/env python3
"""The operator behind a proxy that misbehaves (proxy.py), on a real API server with fake kubelets: storms of 409, 410, 429 and 5xx,
cut connections, answers that get lost, watches that expire, tear or fall silent, and everything at once.

The silence comes first, behind a proxy and an operator of its own, and is looked at last: it takes a minute and a half to be noticed.

In each storm pipelines are made, scaled, changed, deleted, and pods are lost. When it is over every pipeline that is left must serve
as one group, with each pod once and nothing beside them; the operator must come to rest; and at no time may there have been two
groups of one epoch (world.Invariants).

  storms_test.py QWEN_CONTROLLER [SEED]
"""
import ctypes
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "tests/sanitize")]
import reports  # noqa: E402
from proxy import Faults, Proxy  # noqa: E402
from world import SLOWNESS, World  # noqa: E402

PR_SET_PDEATHSIG = 1  # an operator ends with the test, also when that is killed
NS, SILENT = "default", "silent"
STORM_S = 8
CONVERGED_S = 60  # the queue's back-off after many failures in a row dominates; it is at most half a minute by then
HALF_OPEN_S = 110  # 80 s of silence are half-open, because bookmarks come every 60; then a second of back-off
STORMS = {
    "conflicts": Faults(0.6, codes=(409,)),
    "expired": Faults(0.6, codes=(410,)),
    "too many requests": Faults(0.7, codes=(429,)),
    "a broken server": Faults(0.6, codes=(500, 503, 504)),
    "lost answers": Faults(0.5, cut=True, lost=True, torn=True),
    "everything, elections too": Faults(0.6, codes=(409, 410, 429, 500, 503, 504), cut=True, lost=True, torn=True, leases=True),
}


class Operator:
    """One replica, started again when it ends, as its Deployment would."""

    def __init__(self, program, kubeconfig, log, name, *more):
        self.command = [program, "--kubeconfig", kubeconfig, "--image-head", "test/head:1", "--image-stage", "test/stage:1", "--metrics-port", "0",
                        "--lease-seconds", "6", "--identity", name, *more]
        self.log, self.stopping, self.ends = log, False, []
        self.start()
        threading.Thread(target=self.keep, daemon=True).start()

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(list(map(str, self.command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=reports.environment(self.log.parent),
                                            preexec_fn=lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL))

    def keep(self):
        while not self.stopping:
            code = self.process.wait()
            if not self.stopping:
                self.ends.append(code)
                time.sleep(0.5)
                self.start()

    def stop(self):
        self.stopping = True
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Storms:
    def __init__(self, world, proxy, operators, seed, namespace=NS):
        self.world, self.proxy, self.operators, self.random, self.namespace = world, proxy, operators, random.Random(seed), namespace
        self.wanted = {}  # name -> {"stages": n, "replicas": n}
        self.made = 0

    # -- what goes on in a storm; past the proxy, so that it is really wished

    def create(self):
        self.made += 1
        name, stages = f"p{self.made}", self.random.randint(1, 4)
        self.world.apply(self.world.manifest(self.namespace, name, stages, restart={"budget": 100, "backoffSeconds": 1}))
        self.wanted[name] = {"stages": stages, "replicas": 1}

    def lose_a_pod(self, name):
        """Of a group that is whole: one that still grows may get the missing pod again under its name."""
        pods = self.world.pods(self.namespace, name)
        want = self.wanted[name]
        if len(pods) == (want["stages"] + 1) * want["replicas"] and self.world.ready(self.namespace, name):
            victim = self.random.choice(sorted(pods))
            self.world.call(f"/api/v1/namespaces/{self.namespace}/pods/{victim}", "DELETE", {"gracePeriodSeconds": 0})

    def scale(self, name):
        replicas = self.wanted[name]["replicas"] = 3 - self.wanted[name]["replicas"]
        self.world.patch(self.namespace, name, replicas=replicas)

    def change(self, name):
        stages = self.wanted[name]["stages"] = self.wanted[name]["stages"] % 4 + 1
        self.world.patch(self.namespace, name, stages={"count": stages})

    def delete(self, name):
        self.world.kubectl("-n", self.namespace, "delete", "qp", name, "--wait=false")
        del self.wanted[name]

    def rage(self, expire):
        end = time.monotonic() + STORM_S
        self.create()
        while time.monotonic() < end:
            names = sorted(self.wanted)
            act = self.random.choice([self.lose_a_pod] * 4 + [self.scale, self.change] + [self.delete] * (len(names) > 3))
            try:
                act(self.random.choice(names))
            except (OSError, KeyError, subprocess.CalledProcessError):
                pass  # the pod went a moment before
            if expire:
                self.random.choice([self.proxy.expire_watches, self.proxy.tear_watches])()
            time.sleep(0.4)

    def refused_deletions(self):
        """Nothing else happens that could remind the operator of what it still has to delete."""
        name, replicas = next((n, w["replicas"]) for n, w in self.wanted.items())
        self.proxy.faults, self.proxy.done = Faults(1.0, codes=(409,), methods=("DELETE",)), {}
        self.world.patch(self.namespace, name, suspend=True)
        self.wanted[name]["replicas"] = 0
        self.world.within("deletions are refused", 20, lambda: self.proxy.done.get(409, 0) > 0)
        time.sleep(3)
        self.quiet("deletions refused", 30)
        self.world.patch(self.namespace, name, suspend=False)
        self.wanted[name]["replicas"] = replicas
        self.quiet("and woken again", 30)

    # -- what must be true afterwards

    def astray(self):
        """What is not as it should be, in words; [] when all is well."""
        wrong = []
        pods = self.world.call(f"/api/v1/namespaces/{self.namespace}/pods?labelSelector=qwenpipeline.dev/pipeline")["items"]
        members = {}
        for pod in pods:
            labels = pod["metadata"]["labels"]
            members.setdefault((labels["qwenpipeline.dev/pipeline"], labels["qwenpipeline.dev/replica"]), []).append(
                (labels["qwenpipeline.dev/group"], labels.get("qwenpipeline.dev/stage", "head")))
        for name, want in self.wanted.items():
            if want["replicas"] and not self.world.ready(self.namespace, name):
                wrong.append(f"{name} is not Ready: {self.world.condition(self.namespace, name)}")
            for replica in range(want["replicas"]):
                found = sorted(members.pop((name, str(replica)), []))
                groups = {group for group, _ in found}
                if len(groups) != 1 or [m for _, m in found] != sorted(["head", *map(str, range(want["stages"]))]):
                    wrong.append(f"replica {replica} of {name} is {found}")
        return wrong + [f"orphans: {key} {found}" for key, found in members.items()]

    def quiet(self, what, limit_s=CONVERGED_S):
        self.proxy.faults = Faults()
        self.world.within(f"{what}: over, and everything is as it was asked for", limit_s, lambda: not self.astray(), self.astray)
        time.sleep(1)
        before = len(self.proxy.writes)
        time.sleep(3)
        self.world.check(f"{what}: and at rest, no write in 3 s", len(self.proxy.writes) == before, self.proxy.writes[before:])

    def run(self):
        self.create()
        self.create()
        self.quiet("fair weather")
        self.refused_deletions()
        for what, faults in STORMS.items():
            self.proxy.faults, self.proxy.done = faults, {}
            self.rage(expire=410 in faults.codes)
            done = {k: v for k, v in self.proxy.done.items() if k}
            self.world.check(f"{what}: a storm it was: {done}", sum(done.values()) > 5, self.proxy.done)
            self.quiet(what)


class Silence:
    """Half-open watches: a namespace with an operator and a proxy of its own."""

    def __init__(self, world, proxy):
        self.world, self.proxy, self.took = world, proxy, None

    def begin(self):
        world = self.world
        world.apply(world.manifest(SILENT, "still", 2))
        world.within("half-open: a pipeline serves", 30, lambda: world.ready(SILENT, "still"), lambda: world.condition(SILENT, "still"))
        frozen = self.proxy.freeze_watches()
        world.check(f"half-open: {frozen} watches fall silent", frozen >= 4, frozen)
        world.call(f"/api/v1/namespaces/{SILENT}/pods/still-0-stage-1-1", "DELETE", {"gracePeriodSeconds": 0})
        self.since = time.monotonic()
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        while not self.world.holds(lambda: self.world.ready(SILENT, "still", 1) and self.world.epoch(SILENT, "still") == 2 and len(self.world.pods(SILENT, "still")) == 3):
            time.sleep(0.5)
        self.took = time.monotonic() - self.since

    def end(self):
        self.world.within("half-open: it is noticed", HALF_OPEN_S, lambda: self.took)
        self.world.check(f"half-open: the loss behind it was found and repaired after {self.took or -1:.0f} s", self.took and 1 < self.took < HALF_OPEN_S * SLOWNESS, self.took)


def main():
    program, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20261121
    print(f"seed {seed}")
    operators, own = [], []
    with World(nodes=0) as world:
        try:
            world.define()
            world.claim(NS, "digits", ROOT / "docs/examples/digits-checkpoint")
            world.namespace(SILENT)
            world.claim(SILENT, "digits", ROOT / "docs/examples/digits-checkpoint")
            still = Proxy(world.cluster, seed)
            own.append(Operator(program, still.kubeconfig, world.folder / "still.log", "still", "--namespace", SILENT, "--leader-election", "false"))
            silence = Silence(world, still)
            silence.begin()
            proxy = Proxy(world.cluster, seed)
            operators = [Operator(program, proxy.kubeconfig, world.folder / f"{name}.log", name, "--namespace", NS) for name in ("one", "two")]
            storms = Storms(world, proxy, operators, seed)
            storms.run()
            silence.end()
            world.check("half-open: the operator never ended", not own[0].ends, own[0].ends)
            ends = [code for operator in operators for code in operator.ends]
            world.check(f"operators ended {len(ends)} times, each because it lost its lease", set(ends) <= {1}, ends)
            lost = sum(len(re.findall("the lease was lost", operator.log.read_text())) for operator in operators)
            world.check("and said so", lost == len(ends), (lost, ends))
            said = reports.read(world.folder)
            world.check("no sanitizer said anything", not said, "\n".join(said)[:6000])
            for name in list(storms.wanted):
                storms.delete(name)
            world.kubectl("-n", SILENT, "delete", "qp", "still", "--wait=false")
            world.within("deleted: nothing is left", 30, lambda: not world.call("/api/v1/pods?labelSelector=qwenpipeline.dev/pipeline")["items"])
            world.invariants.end()
        finally:
            for operator in operators + own:
                operator.stop()
                if world.failed or sys.exc_info()[0]:
                    print(f"---- {operator.log.name}\n" + operator.log.read_text()[-4000:])
    return 1 if world.failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Faults of a pipeline that serves, on real nodes with real pods: a stage killed, the head killed, a stage hung, the API server killed,
the operator killed between two writes, its leader frozen, a node without power, a node without its cable.

After each the digits are answered right again under a new epoch; while they go on somebody asks all the time, and no answer may ever be
wrong; at no time two groups of one epoch (world.Invariants); in the end no orphan. A stage that is killed costs no request: streams that
were on their way go on, byte for byte what they are when nothing happens, and who asks meanwhile waits and is answered.
"""
import os
import signal
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "tests")]
from digits import Stream, pictures  # noqa: E402
from world import Asker, World  # noqa: E402

NS = "models"
NAME = "digits"


class Hung:
    """A second pipeline whose stage hangs while the first has other troubles: liveness takes a minute to be sure."""

    def __init__(self, world):
        self.world, self.took = world, None
        self.pod = f"slow-0-stage-0-{world.epoch(NS, 'slow')}"
        self.epoch = world.epoch(NS, "slow")
        os.kill(world.process(self.pod)[1], signal.SIGSTOP)
        self.since = time.monotonic()
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        while not self.world.holds(lambda: self.world.ready(NS, "slow", self.epoch)):
            time.sleep(0.5)
        self.took = time.monotonic() - self.since

    def end(self):
        world = self.world
        world.within("a stage hangs: its group serves again", 120, lambda: self.took, lambda: world.condition(NS, "slow"))
        world.check(f"which took {self.took or -1:.0f} s", self.took and self.took < 120)
        file, right = pictures()[0]
        world.within("and answers right", 60, lambda: world.ask(NS, "slow", file) == right)
        world.within("the hung process is gone", 60, lambda: self.pod not in [env["QWEN_POD_NAME"] for _, _, env in world.processes()])
        world.kubectl("-n", NS, "delete", "qp", "slow", "--timeout=60s")
        world.within("deleted: nothing is left", 60, lambda: not world.left(NS, "slow"), lambda: world.left(NS, "slow"))


def stream(world, file, tokens):
    """Through the Service, from one of the nodes."""
    address = world.call(f"/api/v1/namespaces/{NS}/services/{NAME}")["spec"]["clusterIP"]
    node = next(n for n in world.cluster.nodes_of() if world.cluster.pid(n.name))
    return Stream(f"http://{address}:8000", file, tokens, inside=node.inside)


class Faults:
    def __init__(self, world, asker):
        self.world, self.asker, self.stories = world, asker, 0

    def serves_again(self, what, limit_s, epoch):
        """Under a higher epoch than `epoch`, and answers."""
        world = self.world
        world.within(f"{what}: serves again", limit_s, lambda: world.ready(NS, NAME, epoch), lambda: world.condition(NS, NAME))
        since = time.monotonic()
        world.within(f"{what}: and answers", 60, lambda: self.asker.last > since)
        self.stories += 1  # a change of the spec forgets the failures so far: the growing back-off is not what these stories are about
        world.patch(NS, NAME, restart={"budget": 100 + self.stories})
        world.within("it took note of that", 60, lambda: world.ready(NS, NAME))

    def pod(self, role):
        """The living one of that role, whatever epoch its name carries."""
        return next(name for name in self.world.living(NS, NAME) if name.startswith(f"{NAME}-0-{role}-"))

    def uids(self):
        return {name: pod["metadata"]["uid"] for name, pod in self.world.pods(NS, NAME).items() if "deletionTimestamp" not in pod["metadata"]}

    def leader(self):
        """(node, pid) of the operator that leads."""
        holder = self.world.call("/apis/coordination.k8s.io/v1/namespaces/qwen-system/leases/qwen-controller")["spec"]["holderIdentity"]
        return next((node, pid) for node, pid, env in self.world.processes("qwen-controller") if holder.startswith(env["QWEN_POD_NAME"]))

    # -- stories

    def stage_killed(self):
        """No request is lost or answered otherwise, and nobody else's weights are."""
        world, epoch, before = self.world, self.world.epoch(NS, NAME), self.uids()
        files, tokens = [file for file, _ in pictures()[:3]], 700
        world.answers("the Service leads to the head", NS, NAME, 1)  # which waits for the nodes' proxies; a stream does not
        undisturbed = [stream(world, file, tokens).text() for file in files]
        world.check("three streams, undisturbed", all(len(text) > 100 and "broken off" not in text for text in undisturbed), undisturbed)
        streams = [stream(world, file, tokens) for file in files]
        world.within("the same streams are on their way", 60, lambda: all(len(s.pieces) > 20 for s in streams), lambda: [(len(s.pieces), s.error) for s in streams])
        killed = self.pod("stage-2")
        os.kill(world.process(killed)[1], signal.SIGKILL)
        far = [len(s.pieces) for s in streams]
        late, told = [], []  # who asks while the stage is away
        for file, right in pictures()[:6]:
            asking = threading.Thread(target=lambda f=file, r=right: late.append((world.attempt(lambda: world.ask(NS, NAME, f, timeout=60)), r)), daemon=True)
            asking.start()
            told.append(asking)
            time.sleep(0.5)
        world.check(f"a stage is killed when they have {far} of {tokens} pieces: each goes on to what it is undisturbed", [s.text() for s in streams] == undisturbed,
                    [s.text()[-200:] for s in streams])
        for asking in told:
            asking.join(90)
        world.check("who asks meanwhile is answered, and right", len(late) == 6 and all(answer == right for answer, right in late), late)
        self.serves_again("a stage is killed", 45, epoch)
        after = self.uids()
        world.check("its pod was made again, every other one is the one that it was", killed not in after and
                    {n: u for n, u in before.items() if n != killed} == {n: u for n, u in after.items() if n in before} and len(after) == len(before), (before, after))

    def head_killed(self):
        world, epoch, before = self.world, self.world.epoch(NS, NAME), self.uids()
        killed = self.pod("head")
        os.kill(world.process(killed)[1], signal.SIGKILL)
        self.serves_again("the head is killed", 60, epoch)
        world.check("the stages kept their weights", {n: u for n, u in self.uids().items() if "-stage-" in n} == {n: u for n, u in before.items() if "-stage-" in n},
                    (before, self.uids()))

    def api_server_killed(self):
        epoch, stage = self.world.epoch(NS, NAME), self.pod("stage-3")
        self.world.cluster.kill("kube-apiserver")
        os.kill(self.world.process(stage)[1], signal.SIGKILL)
        time.sleep(5)
        self.world.cluster.run("kube-apiserver")
        self.world.cluster.ready()
        self.serves_again("a stage is killed while the API server is dead", 90, epoch)

    def operator_killed(self):
        epoch = self.world.epoch(NS, NAME)
        _, leader = self.leader()
        for stage in ("stage-0", "stage-1", "stage-3"):
            os.kill(self.world.process(self.pod(stage))[1], signal.SIGKILL)
        self.world.within("the operator begins the next epoch", 60, lambda: any(n.endswith(f"-{epoch + 1}") for n in self.world.pods(NS, NAME)))
        os.kill(leader, signal.SIGKILL)
        made = len([n for n in self.world.pods(NS, NAME) if n.endswith(f"-{epoch + 1}")])
        self.serves_again(f"the operator is killed with {made} of 3 pods made", 90, epoch)

    def leader_frozen(self):
        world, epoch = self.world, self.world.epoch(NS, NAME)
        world.within("two operators run", 60, lambda: len(world.processes("qwen-controller")) == 2)
        _, frozen = self.leader()
        os.kill(frozen, signal.SIGSTOP)
        os.kill(world.process(self.pod("stage-2"))[1], signal.SIGKILL)
        world.within("the leading operator is frozen: the other one leads", 60, lambda: self.leader()[1] != frozen)
        os.kill(frozen, signal.SIGCONT)
        world.within("the frozen one wakes up and ends itself", 60, lambda: frozen not in [pid for _, pid, _ in world.processes("qwen-controller")])
        self.serves_again("a stage was killed meanwhile", 45, epoch)

    def node_without_power(self):
        world, epoch = self.world, self.world.epoch(NS, NAME)
        there = [env["QWEN_POD_NAME"] for node, _, env in world.processes() if node.name == "node2"]
        world.check(f"node2 has {len(there)} pods of the group", there)
        world.cluster.kill("node2")
        world.within("node2's power is cut: the group comes to stand on node1", 90, lambda: world.ready(NS, NAME, epoch) and
                     {p["spec"]["nodeName"] for n, p in world.pods(NS, NAME).items() if n in world.living(NS, NAME)} == {"node1"}, lambda: world.condition(NS, NAME))
        self.serves_again("with one node less", 60, epoch)
        world.cluster.run("node2")
        world.cluster.wait_for_node("node2")
        world.within("power is back: nothing of the old group is left", 60, lambda: len(world.pods(NS, NAME)) == 5 and len(world.processes()) == 5,
                     lambda: (sorted(world.pods(NS, NAME)), world.processes()))

    def node_without_cable(self):
        world = self.world
        if not any(node.name == "node2" for node, _, _ in world.processes()):  # after the power cut it stands on node1
            world.kubectl("cordon", "node1")
            os.kill(world.process(self.pod("stage-1"))[1], signal.SIGKILL)
            self.serves_again("moved to node2", 60, world.epoch(NS, NAME))
            world.kubectl("uncordon", "node1")
        epoch = world.epoch(NS, NAME)
        world.cluster.node("node2").cable("down")
        world.within("node2's cable is pulled: the group comes to stand on node1", 90, lambda: world.ready(NS, NAME, epoch), lambda: world.condition(NS, NAME))
        zombies = [env["QWEN_POD_NAME"] for node, _, env in world.processes() if node.name == "node2"]
        world.check(f"{len(zombies)} processes of the old epoch live on, cut off", zombies, world.processes())
        self.serves_again("beside them", 60, epoch)
        world.cluster.node("node2").cable("up")
        world.within("the cable is back: they go, and only one group is left", 90, lambda: len(world.processes()) == 5 and len(world.pods(NS, NAME)) == 5,
                     lambda: (sorted(world.pods(NS, NAME)), world.processes()))


def main():
    with World(nodes=2) as world:
        world.install()
        world.namespace(NS)
        world.claim(NS, NAME, ROOT / "docs/examples/digits-checkpoint")
        digits = world.manifest(NS, NAME, 4, restart={"budget": 100, "backoffSeconds": 1}, server={"drainTimeoutSeconds": 5})
        digits["spec"]["model"]["dtype"] = "Float32"  # what a bfloat16 model says when it decides between near-ties depends on the batch
        world.apply(digits)
        world.apply(world.manifest(NS, "slow", 1, server={"drainTimeoutSeconds": 5}))
        for name in (NAME, "slow"):
            world.within(f"{name} serves", 90, lambda: world.ready(NS, name), lambda: world.condition(NS, name))
        hung = Hung(world)
        asker = Asker(world, NS, NAME)
        faults = Faults(world, asker)
        for story in (faults.stage_killed, faults.head_killed, faults.operator_killed, faults.leader_frozen, hung.end, faults.api_server_killed,
                      faults.node_without_power, faults.node_without_cable):
            print(f"---- {story.__qualname__}", flush=True)
            story()
        asker.end(may_refuse=True)
        world.kubectl("-n", NS, "delete", "qp", NAME, "--timeout=60s")
        world.within("deleted: nothing is left", 60, lambda: not world.left(NS, NAME), lambda: world.left(NS, NAME))
        world.invariants.end()
    return 1 if world.failed else 0


if __name__ == "__main__":
    sys.exit(main())

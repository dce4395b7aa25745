"""What the API server told of pods and pipelines, in its order, each with the moment at which it was heard: two watches.

A story that looks now and then does not see a condition that stands for a second, and counts its own slowness as somebody else's.
Here both ends of a claim like "named within 5 s" are moments at which the API server spoke.
"""
import json
import re
import threading
import time

PODS = "/api/v1/pods"
PIPELINES = "/apis/qwenpipeline.dev/v1alpha1/qwenpipelines"
SILENCE_S = 90  # bookmarks come every minute


class History:
    """Of everything since it was made. Times are time.monotonic(); `since` leaves out what was heard before it."""

    def __init__(self, cluster):
        self.cluster, self.opener, self.lock = cluster, cluster.opener(), threading.Lock()
        self.heard = {PODS: [], PIPELINES: []}  # [(moment, ADDED, MODIFIED or DELETED, object)]
        for path in self.heard:
            threading.Thread(target=self.watch, args=(path,), daemon=True).start()

    def watch(self, path):
        version = None
        while self.cluster.dir.exists():
            try:
                if version is None:
                    version = self.begin(path)
                query = f"?watch=1&allowWatchBookmarks=true&timeoutSeconds=600&resourceVersion={version}"
                with self.opener.open(self.cluster.server + path + query, timeout=SILENCE_S) as stream:
                    for line in stream:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            version = None
                            break
                        version = event["object"]["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            self.note(path, event["type"], event["object"])
            except (OSError, ValueError):
                time.sleep(0.2)  # the server is away, or does not know the kind yet

    def begin(self, path):
        with self.opener.open(self.cluster.server + path, timeout=SILENCE_S) as answer:
            listed = json.loads(answer.read())
        for item in listed["items"]:
            self.note(path, "ADDED", item)
        return listed["metadata"]["resourceVersion"]

    def note(self, path, kind, item):
        item["metadata"].pop("managedFields", None)
        with self.lock:
            self.heard[path].append((time.monotonic(), kind, item))

    def first(self, path, namespace, since, met):
        with self.lock:
            told = list(self.heard[path])
        return next((moment for moment, kind, item in told if moment >= since and item["metadata"]["namespace"] == namespace and met(kind, item)), None)

    # -- moments, or None

    def pod(self, namespace, name, met, since):
        """The first at which a pod of the pipeline was so."""
        return self.first(PODS, namespace, since, lambda _, pod: pod["metadata"].get("labels", {}).get("qwenpipeline.dev/pipeline") == name and met(pod))

    def pods_made(self, namespace, names, since):
        """The one at which the last of these pods was there."""
        moments = [self.first(PODS, namespace, since, lambda kind, pod, name=name: kind == "ADDED" and pod["metadata"]["name"] == name) for name in names]
        return None if None in moments else max(moments)

    def pipeline(self, namespace, name, met, since):
        return self.first(PIPELINES, namespace, since, lambda _, pipeline: pipeline["metadata"]["name"] == name and met(pipeline))

    def named(self, namespace, name, reason, pattern, since):
        """The first at which the condition Ready was False for `reason` (empty: any), with a message that matches."""
        def so(pipeline):
            return any(c["type"] == "Ready" and c["status"] == "False" and reason in ("", c["reason"]) and re.search(pattern, c["message"])
                       for c in pipeline.get("status", {}).get("conditions", []))
        return self.pipeline(namespace, name, so, since)

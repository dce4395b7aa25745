// Prints the registry of controller/kube as Prometheus text, every family with one series, labelled as the operator labels it: what
// panels and alerts may ask for. A family without a series is not exported, so each is touched once.
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <iostream>

#include "controller/kube/metrics.h"

int main() {
  prometheus::Registry registry;
  qwen::kube::Metrics metrics(registry, "kubernetes.default.svc:443");
  metrics.RestRequest("GET", 200, 1500);
  metrics.QueueAdd("qwenpipeline", 1);
  metrics.QueueRetry("qwenpipeline");
  metrics.QueueGet("qwenpipeline", 0, 10);
  metrics.QueueDone("qwenpipeline", 100);
  metrics.QueueUnfinished("qwenpipeline", 0, 0);
  metrics.Workers("qwenpipeline", 4);
  metrics.ReconcileStart("qwenpipeline");
  metrics.ReconcileEnd("qwenpipeline", "success", 2000);
  metrics.Leader("qwen-controller", true);
  metrics.LeaderSlowpath("qwen-controller");
  metrics.ReflectorList("pods");
  metrics.ReflectorWatch("pods");
  metrics.ReflectorError("pods");
  metrics.EventDropped();
  std::cout << prometheus::TextSerializer().Serialize(registry.Collect());
}

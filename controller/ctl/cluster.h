// controller/ctl/cluster.h — a cluster seen from a terminal: what qwenctl asks an API server, and a pipeline as the operator would
// see it. Reads only; nothing here writes. Thread safety: one thread.
#pragma once
#include <prometheus/registry.h>

#include <CLI/CLI.hpp>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "controller/kube/client.h"
#include "controller/plan/objects.h"
#include "controller/plan/observed.h"
#include "stage/base/clock.h"
#include "stage/base/status.h"

namespace qwen::ctl {

struct ClusterFlags {
  std::string kubeconfig, context, namespace_name;  // empty: as kubectl would
};
void AddClusterFlags(CLI::App& command, ClusterFlags& flags);

class Cluster {
 public:
  static Result<std::unique_ptr<Cluster>> Open(const ClusterFlags& flags);

  const std::string& namespace_name() const { return namespace_; }
  // Objects of `namespace_name` (empty: all). The error is the server's own words.
  Result<std::vector<kube::Json>> List(const kube::Resource& resource, const std::string& namespace_name, const std::string& label_selector = {});
  Result<kube::Json> Get(const kube::Resource& resource, const std::string& name);
  // The text of a pod's log, last lines first cut off; `previous`: of its container's last life. kNotFound: no such pod.
  Result<std::string> Log(const std::string& pod, int32_t lines);
  // Every piece as it comes, until the pod ends.
  Status FollowLog(const std::string& pod, int32_t lines, const std::function<void(std::string_view)>& on_text);

  // A pipeline and all that belongs to it. kNotFound: there is none of that name.
  Result<plan::Observed> Observe(const std::string& pipeline);
  // The images that the operator of this cluster was started with, out of its Deployment; kNotFound: it is not to be found.
  Result<plan::Images> OperatorImages();

 private:
  Cluster(kube::ClusterAccess access, std::unique_ptr<kube::Transport> transport, std::string namespace_name);

  SteadyClock clock_;
  prometheus::Registry registry_;
  kube::Metrics metrics_;
  std::unique_ptr<kube::Transport> transport_;
  kube::Client client_;
  const std::string namespace_;
};

}  // namespace qwen::ctl

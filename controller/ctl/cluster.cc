#include "controller/ctl/cluster.h"

#include <algorithm>

#include "controller/kube/kubeconfig.h"
#include "controller/reconcile/views.h"
#include "stage/contract/pod_contract.h"

namespace qwen::ctl {
namespace {
namespace resources = kube::resources;
const kube::Resource kDeployments{"apps", "v1", "deployments", "Deployment"};

std::string LogPath(const std::string& namespace_name, const std::string& pod, int32_t lines, bool follow) {
  return kube::ResourcePath(resources::kPods, namespace_name, pod) + "/log?tailLines=" + std::to_string(lines) + (follow ? "&follow=true" : "");
}

}  // namespace

void AddClusterFlags(CLI::App& command, ClusterFlags& flags) {
  command.add_option("-n,--namespace", flags.namespace_name, "default: that of the kubeconfig's context");
  command.add_option("--kubeconfig", flags.kubeconfig, "default: $KUBECONFIG, else ~/.kube/config");
  command.add_option("--context", flags.context, "of the kubeconfig; default: its current one");
}

Cluster::Cluster(kube::ClusterAccess access, std::unique_ptr<kube::Transport> transport, std::string namespace_name)
    : metrics_(registry_, access.server),
      transport_(std::move(transport)),
      client_(*transport_, clock_, metrics_, {.field_manager = "qwenctl"}),
      namespace_(std::move(namespace_name)) {}

Result<std::unique_ptr<Cluster>> Cluster::Open(const ClusterFlags& flags) {
  static const SteadyClock clock;  // of credentials, which outlive this call
  ASSIGN_OR_RETURN(kube::ClusterAccess access, kube::FindCluster(flags.kubeconfig, flags.context, clock));
  ASSIGN_OR_RETURN(std::unique_ptr<kube::Transport> transport, kube::MakeTransport(access, {}));
  const std::string in = flags.namespace_name.empty() ? access.namespace_name : flags.namespace_name;
  return std::unique_ptr<Cluster>(new Cluster(std::move(access), std::move(transport), in));
}

Result<std::vector<kube::Json>> Cluster::List(const kube::Resource& resource, const std::string& namespace_name, const std::string& label_selector) {
  std::vector<kube::Json> items;
  const kube::Answer answer =
      client_.List(resource, {.namespace_name = namespace_name, .label_selector = label_selector}, [&](kube::Json item) { items.push_back(std::move(item)); });
  if (!answer.ok()) return answer.status().WithContext(resource.plural);
  return items;
}

Result<kube::Json> Cluster::Get(const kube::Resource& resource, const std::string& name) {
  kube::Answer answer = client_.Get(resource, {namespace_, name});
  if (!answer.ok()) return answer.status();
  return std::move(answer.body);
}

Result<std::string> Cluster::Log(const std::string& pod, int32_t lines) {
  ASSIGN_OR_RETURN(const kube::HttpResponse response, kube::SendAndWait(*transport_, {.method = kube::Method::kGet, .path = LogPath(namespace_, pod, lines, false)}));
  if (response.status != 200) return kube::ParseAnswer(response).status();
  return response.body;
}

Status Cluster::FollowLog(const std::string& pod, int32_t lines, const std::function<void(std::string_view)>& on_text) {
  ASSIGN_OR_RETURN(const kube::HttpResponse response,
                   transport_->Stream({.method = kube::Method::kGet, .path = LogPath(namespace_, pod, lines, true)},
                                      [&](std::string_view text) {
                                        on_text(text);
                                        return true;
                                      },
                                      {}));
  return response.status == 200 ? OkStatus() : kube::ParseAnswer(response).status();
}

Result<plan::Observed> Cluster::Observe(const std::string& pipeline) {
  ASSIGN_OR_RETURN(const kube::Json object, Get(resources::kQwenPipelines, pipeline));
  const reconcile::PipelineView view = reconcile::DecodePipeline(object);
  if (!view.pipeline.ok()) return view.pipeline.status();
  plan::Observed observed;
  observed.generation = view.meta.generation;
  observed.previous = view.status;
  observed.deleting = view.meta.deleting;
  observed.pipeline = *view.pipeline;
  observed.has_finalizer = std::find(view.finalizers.begin(), view.finalizers.end(), contract::kDrainFinalizer) != view.finalizers.end();
  observed.has_secret = true;  // nobody's business here: a person who may not read Secrets may still look
  const std::string selector = std::string(contract::kLabelPipeline) + "=" + pipeline;
  const auto each = [&](const kube::Resource& resource, const auto& take) -> Status {
    ASSIGN_OR_RETURN(const std::vector<kube::Json> items, List(resource, namespace_, selector));
    for (const kube::Json& item : items)
      if (kube::ParseMeta(item).owner_uid == view.meta.uid) take(item);
    return OkStatus();
  };
  RETURN_IF_ERROR(each(resources::kPods, [&](const kube::Json& item) { observed.pods.push_back(reconcile::DecodePod(item).pod); }));
  for (const kube::Resource* resource : {&resources::kServices, &resources::kNetworkPolicies, &resources::kPodDisruptionBudgets})
    RETURN_IF_ERROR(each(*resource, [&](const kube::Json& item) {
      observed.children[resource->kind + "/" + kube::KeyOf(item).name] = reconcile::DecodeChild(item).fingerprint;
    }));
  RETURN_IF_ERROR(each(resources::kPersistentVolumeClaims, [&](const kube::Json& item) { observed.claims.insert(kube::KeyOf(item).name); }));
  RETURN_IF_ERROR(each(resources::kJobs, [&](const kube::Json& item) { observed.jobs[kube::KeyOf(item).name] = reconcile::DecodeJob(item).job; }));
  return observed;
}

Result<plan::Images> Cluster::OperatorImages() {
  const std::string selector = "app.kubernetes.io/name=qwen-pipeline,app.kubernetes.io/component=controller";
  ASSIGN_OR_RETURN(const std::vector<kube::Json> deployments, List(kDeployments, "", selector));
  for (const kube::Json& deployment : deployments) {
    const kube::Json* args = kube::FindAt(deployment, "/spec/template/spec/containers/0/args");
    if (args == nullptr || !args->is_array()) continue;
    plan::Images images;
    for (const kube::Json& argument : *args) {
      const std::string text = argument.is_string() ? argument.get<std::string>() : "";
      for (const auto& [flag, image] : {std::pair{"--image-head=", &images.head}, {"--image-stage=", &images.stage}, {"--image-export=", &images.exporter}})
        if (text.starts_with(flag)) *image = text.substr(std::string_view(flag).size());
    }
    if (!images.head.empty() && !images.stage.empty()) return images;
  }
  return NotFoundError("no operator of the chart is in sight: give --image-head and --image-stage");
}

}  // namespace qwen::ctl

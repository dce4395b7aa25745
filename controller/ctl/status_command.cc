// qwenctl status, logs and diff: a cluster's pipelines for people at a terminal.
#include "controller/ctl/status_command.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <thread>

#include "controller/ctl/cluster.h"
#include "controller/ctl/commands.h"
#include "controller/ctl/manifest.h"
#include "controller/ctl/table.h"
#include "controller/kube/time_text.h"
#include "controller/plan/group.h"
#include "controller/plan/plan.h"
#include "controller/plan/status.h"
#include "stage/contract/pod_contract.h"

namespace qwen::ctl {
namespace {
using kube::Json;
namespace resources = kube::resources;

std::string Truth(const api::Condition* condition) { return condition == nullptr ? "Unknown" : condition->value ? "True" : "False"; }

void Leaves(const Json& value, const std::string& path, std::map<std::string, std::string>& out) {
  if (value.is_object() && !value.empty()) {
    for (const auto& [key, item] : value.items()) Leaves(item, path.empty() ? key : path + "." + key, out);
  } else if (value.is_array() && !value.empty()) {
    for (size_t i = 0; i < value.size(); ++i) Leaves(value[i], path + "[" + std::to_string(i) + "]", out);
  } else {
    out[path] = value.dump();
  }
}

// Listed, or one of `names` by itself. `wide`: its conditions, groups and pods.
Result<int> ShowOne(Cluster& cluster, const std::string& name) {
  ASSIGN_OR_RETURN(const plan::Observed observed, cluster.Observe(name));
  std::fputs(StatusText(observed).c_str(), stdout);
  const api::Condition* ready = plan::FindCondition(observed.previous, "Ready");
  return ready != nullptr && ready->value ? 0 : 1;
}

Result<int> ShowAll(Cluster& cluster, bool everywhere) {
  ASSIGN_OR_RETURN(const std::vector<Json> items, cluster.List(resources::kQwenPipelines, everywhere ? "" : cluster.namespace_name()));
  Table table({"pipeline", "ready", "reason", "stages", "replicas", "epoch", "restarts"});
  for (const Json& item : items) {
    const kube::ObjectKey key = kube::KeyOf(item);
    const Json* status = kube::FindAt(item, "/status");
    const api::PipelineStatus read = api::ParseStatus(status == nullptr ? "" : status->dump());
    const api::Condition* ready = plan::FindCondition(read, "Ready");
    table.Add({everywhere ? key.ToString() : key.name, Truth(ready), ready == nullptr ? "-" : ready->reason, read.stages.empty() ? "-" : read.stages,
               std::to_string(read.ready_replicas), std::to_string(read.epoch), std::to_string(read.restarts)});
  }
  std::fputs(table.ToString().c_str(), stdout);
  return 0;
}

struct LogFlags {
  std::string pipeline;
  std::optional<int32_t> stage;
  bool head = false, follow = false;
  int32_t replica = 0, lines = 50;
};

void PrintLines(const std::string& name, const std::string& text) {
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::printf("%s  %.*s\n", name.c_str(), static_cast<int>(end - begin), text.data() + begin);
    begin = end + 1;
  }
}

Result<int> ShowLogs(Cluster& cluster, const LogFlags& flags) {
  ASSIGN_OR_RETURN(const plan::Observed observed, cluster.Observe(flags.pipeline));
  api::GroupRecord current;  // older groups, and pods that were replaced, are going
  for (const api::GroupRecord& group : observed.previous.groups)
    if (group.replica == flags.replica) current = group;
  std::vector<std::string> names;
  for (const plan::ObservedPod& pod : observed.pods)
    if (pod.replica == flags.replica && plan::IsMember(current, pod) && (!flags.head || pod.stage < 0) && (!flags.stage || pod.stage == *flags.stage)) names.push_back(pod.name);
  if (names.empty()) return NotFoundError("replica " + std::to_string(flags.replica) + " of " + flags.pipeline + " has no such pod");
  if (!flags.follow) {
    for (const std::string& name : names) {
      const Result<std::string> text = cluster.Log(name, flags.lines);
      PrintLines(name, text.ok() ? *text : "(" + text.status().message() + ")\n");
    }
    return 0;
  }
  if (names.size() != 1) return InvalidArgumentError("--follow: choose one pod by --head or --stage");
  RETURN_IF_ERROR(cluster.FollowLog(names[0], flags.lines, [](std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }));
  return 0;
}

struct DiffFlags {
  std::string manifest, pipeline;
  plan::Images images;
};

// The manifest instead of what the cluster has, as if it had just been applied; or what is there, as it is.
Result<int> ShowDiff(Cluster& cluster, DiffFlags flags) {
  plan::Observed observed;
  std::optional<api::QwenPipeline> wanted;
  if (!flags.manifest.empty()) {
    ASSIGN_OR_RETURN(wanted, LoadManifest(flags.manifest));
    flags.pipeline = wanted->metadata.name;
  }
  Result<plan::Observed> there = cluster.Observe(flags.pipeline);
  if (there.ok()) {
    observed = *std::move(there);
  } else if (!wanted) {
    return there.status();
  } else {
    observed.pipeline.metadata = {.name = flags.pipeline, .namespace_name = cluster.namespace_name(), .uid = "(set when it is created)"};
  }
  if (wanted) {
    observed.pipeline.spec = wanted->spec;
    ++observed.generation;
  }
  if (flags.images.head.empty() || flags.images.stage.empty()) {
    ASSIGN_OR_RETURN(const plan::Images known, cluster.OperatorImages());
    if (flags.images.head.empty()) flags.images.head = known.head;
    if (flags.images.stage.empty()) flags.images.stage = known.stage;
    if (flags.images.exporter.empty()) flags.images.exporter = known.exporter;
  }
  const plan::Actions actions = plan::MakePlan(observed, flags.images, kube::UnixMicros() / 1'000'000);
  std::map<std::string, Json> live;
  for (const Json& child : actions.apply) {
    const std::string name = plan::ChildName(child);
    const std::string kind = name.substr(0, name.find('/'));
    for (const kube::Resource* resource : {&resources::kServices, &resources::kNetworkPolicies, &resources::kPodDisruptionBudgets})
      if (resource->kind == kind)
        if (auto object = cluster.Get(*resource, name.substr(kind.size() + 1)); object.ok()) live[name] = *std::move(object);
  }
  std::fputs(DiffText(observed, actions, live).c_str(), stdout);
  return 0;
}

template <typename Show>
void Finish(const ClusterFlags& flags, int& exit_code, const Show& show) {
  Result<std::unique_ptr<Cluster>> cluster = Cluster::Open(flags);
  const Result<int> code = cluster.ok() ? show(**cluster) : Result<int>(cluster.status());
  exit_code = code.ok() ? *code : Report(code.status());
}

}  // namespace

std::string StatusText(const plan::Observed& observed) {
  const api::PipelineStatus& status = observed.previous;
  std::string out = observed.pipeline.metadata.namespace_name + "/" + observed.pipeline.metadata.name + "  " + status.stages + " stages, " +
                    std::to_string(status.ready_replicas) + " of " + std::to_string(observed.pipeline.spec.replicas) + " replicas, " +
                    std::to_string(status.restarts) + " restarts" + (observed.deleting ? ", being deleted" : "") + "\n";
  if (status.observed_generation != observed.generation) out += "The operator has not seen the latest change yet.\n";
  out += "\n";
  for (const api::Condition& condition : status.conditions)
    out += condition.type + "=" + (condition.value ? "True" : "False") + "  " + condition.reason + ": " + condition.message + "\n";
  Table groups({"replica", "epoch", "phase", "failures", "last failure"});
  for (const api::GroupRecord& group : status.groups) {
    std::string epochs = std::to_string(group.epoch);
    for (const api::Replacement& one : group.replaced)
      epochs += (one.stage < 0 ? ", head: " : ", stage " + std::to_string(one.stage) + ": ") + std::to_string(one.epoch);
    groups.Add({std::to_string(group.replica), epochs, std::string(api::GroupPhaseName(group.phase)), std::to_string(group.failures),
                group.last_failure_message.empty() ? "-" : group.last_failure_message});
    if (group.next) groups.Add({std::to_string(group.replica), std::to_string(group.next->epoch), "beside it", "", "-"});
  }
  Table pods({"pod", "node", "state"});
  std::vector<plan::ObservedPod> ordered = observed.pods;
  std::sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) { return std::tie(a.replica, a.group_epoch, a.stage, a.epoch) < std::tie(b.replica, b.group_epoch, b.stage, b.epoch); });
  for (const plan::ObservedPod& pod : ordered) {
    const std::string why = plan::BlockerOf(pod).message;  // begins with "pod NAME"
    pods.Add({pod.name, pod.node.empty() ? "-" : pod.node, pod.serving() ? "ready" : why.substr(std::min(why.size(), pod.name.size() + 5))});
  }
  return out + "\n" + groups.ToString() + "\n" + pods.ToString();
}

std::string DiffText(const plan::Observed& observed, const plan::Actions& actions, const std::map<std::string, kube::Json>& live) {
  std::string out;
  const auto created = [&](const Json& object) {
    out += "+ " + plan::ChildName(object) + "\n";
    std::map<std::string, std::string> leaves;
    Leaves(object.contains("spec") ? object["spec"] : Json::object(), "", leaves);
    for (const auto& [path, value] : leaves) out += "+   " + path + ": " + value + "\n";
  };
  for (const Json& child : actions.apply) {
    const auto known = live.find(plan::ChildName(child));
    if (known == live.end()) {
      created(child);
      continue;
    }
    out += "~ " + known->first + "\n";
    std::map<std::string, std::string> before, after;
    Leaves(known->second.value("spec", Json::object()), "", before);
    Leaves(child.at("spec"), "", after);
    for (const auto& [path, value] : after) {
      const auto old = before.find(path);
      if (old == before.end() || old->second != value) out += "~   " + path + ": " + (old == before.end() ? "(none)" : old->second) + " -> " + value + "\n";
    }
  }
  for (const std::string& name : actions.delete_children) out += "- " + name + "\n";
  for (const Json& object : actions.create_weights) created(object);
  for (const plan::PodRef& pod : actions.delete_pods) out += "- Pod/" + pod.name + "\n";
  for (const Json& pod : actions.create_pods) created(pod);
  const api::Condition* ready = plan::FindCondition(actions.status, "Ready");
  if (ready != nullptr && (out.empty() || !ready->value)) out += "Ready=" + Truth(ready) + "  " + ready->reason + ": " + ready->message + "\n";
  if (actions.writes(observed) == 0) out += "nothing to do\n";
  return out;
}

void AddStatus(CLI::App& app, int& exit_code) {
  struct Flags {
    ClusterFlags cluster;
    std::string pipeline;
    bool everywhere = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("status", "pipelines of a cluster; of one: conditions, groups and pods (exit 0 when it is Ready)");
  command->add_option("pipeline", flags->pipeline, "its name; default: all");
  command->add_flag("-A,--all-namespaces", flags->everywhere);
  AddClusterFlags(*command, flags->cluster);
  command->callback([flags, &exit_code] {
    Finish(flags->cluster, exit_code, [&](Cluster& cluster) { return flags->pipeline.empty() ? ShowAll(cluster, flags->everywhere) : ShowOne(cluster, flags->pipeline); });
  });
}

void AddLogs(CLI::App& app, int& exit_code) {
  struct Flags {
    ClusterFlags cluster;
    LogFlags log;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("logs", "the last lines of a group's pods, each with its name in front");
  command->add_option("pipeline", flags->log.pipeline)->required();
  command->add_option("--replica", flags->log.replica)->check(CLI::NonNegativeNumber)->capture_default_str();
  auto* stage = command->add_option("--stage", flags->log.stage, "only this one")->check(CLI::NonNegativeNumber);
  command->add_flag("--head", flags->log.head, "only the head")->excludes(stage);
  command->add_option("--tail", flags->log.lines, "lines of each")->check(CLI::Range(1, 100000))->capture_default_str();
  command->add_flag("-f,--follow", flags->log.follow, "what comes, until the pod ends; of one pod");
  AddClusterFlags(*command, flags->cluster);
  command->callback([flags, &exit_code] { Finish(flags->cluster, exit_code, [&](Cluster& cluster) { return ShowLogs(cluster, flags->log); }); });
}

void AddDiff(CLI::App& app, int& exit_code) {
  struct Flags {
    ClusterFlags cluster;
    DiffFlags diff;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("diff", "what the operator would do next in a cluster, with a manifest or as things are; changes nothing");
  auto* file = command->add_option("-f,--file", flags->diff.manifest, "manifest (YAML or JSON)")->check(CLI::ExistingFile);
  command->add_option("pipeline", flags->diff.pipeline, "one that is there")->excludes(file);
  command->add_option("--image-head", flags->diff.images.head, "default: the operator's");
  command->add_option("--image-stage", flags->diff.images.stage, "default: the operator's");
  command->add_option("--image-export", flags->diff.images.exporter, "default: the operator's");
  AddClusterFlags(*command, flags->cluster);
  command->callback([flags, &exit_code] {
    if (flags->diff.manifest.empty() && flags->diff.pipeline.empty()) {
      exit_code = Report(InvalidArgumentError("give a pipeline's name or -f MANIFEST"));
      return;
    }
    Finish(flags->cluster, exit_code, [&](Cluster& cluster) { return ShowDiff(cluster, flags->diff); });
  });
}

}  // namespace qwen::ctl

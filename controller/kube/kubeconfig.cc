#include "controller/kube/kubeconfig.h"

#include <openssl/evp.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace qwen::kube {
namespace {
Result<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFoundError(path + " cannot be read");
  return std::string(std::istreambuf_iterator<char>(file), {});
}

Result<std::string> DecodeBase64(const std::string& name, std::string text) {
  std::erase_if(text, [](char c) { return c == '\n' || c == '\r' || c == ' '; });
  std::string out(text.size() / 4 * 3 + 3, '\0');
  const int size = text.size() % 4 == 0 ? EVP_DecodeBlock(reinterpret_cast<unsigned char*>(out.data()),
                                                          reinterpret_cast<const unsigned char*>(text.data()), static_cast<int>(text.size()))
                                        : -1;
  if (size < 0 || text.empty()) return InvalidArgumentError(name + " is not base64");
  size_t padding = 0;
  while (padding < 2 && text[text.size() - 1 - padding] == '=') ++padding;
  out.resize(static_cast<size_t>(size) - padding);
  return out;
}

std::string Text(const YAML::Node& node, const char* name) {
  const YAML::Node value = node[name];
  return value && value.IsScalar() ? value.as<std::string>() : std::string();
}

// The entry with that name in a list of {name: ..., KIND: {...}}.
Result<YAML::Node> Named(const YAML::Node& list, const std::string& name, const char* kind) {
  for (const YAML::Node& entry : list) {
    if (Text(entry, "name") == name && entry[kind]) return entry[kind];
  }
  return InvalidArgumentError(std::string("kubeconfig: there is no ") + kind + " '" + name + "'");
}

class Parser {
 public:
  Parser(std::string folder, const Clock& clock) : folder_(std::move(folder)), clock_(clock) {}

  Result<ClusterAccess> Parse(const YAML::Node& config, std::string context_name) {
    if (!config.IsMap()) return InvalidArgumentError("kubeconfig: not a mapping");
    if (context_name.empty()) context_name = Text(config, "current-context");
    if (context_name.empty()) return InvalidArgumentError("kubeconfig: neither a context was named nor is there a current-context");
    ASSIGN_OR_RETURN(const YAML::Node context, Named(config["contexts"], context_name, "context"));
    ASSIGN_OR_RETURN(const YAML::Node cluster, Named(config["clusters"], Text(context, "cluster"), "cluster"));
    ASSIGN_OR_RETURN(const YAML::Node user, Named(config["users"], Text(context, "user"), "user"));
    ClusterAccess access;
    if (const std::string ns = Text(context, "namespace"); !ns.empty()) access.namespace_name = ns;
    access.server = Text(cluster, "server");
    if (access.server.empty()) return InvalidArgumentError("kubeconfig: the cluster has no server");
    for (const char* name : {"tls-server-name", "proxy-url"}) {
      if (cluster[name]) return UnimplementedError(std::string("kubeconfig: ") + name + " is not supported");
    }
    access.skip_tls_verify = Text(cluster, "insecure-skip-tls-verify") == "true";
    if (const std::string data = Text(cluster, "certificate-authority-data"); !data.empty()) {
      ASSIGN_OR_RETURN(access.ca_pem, DecodeBase64("certificate-authority-data", data));
    } else {
      access.ca_file = Path(Text(cluster, "certificate-authority"));
    }
    ASSIGN_OR_RETURN(Credentials::Loader loader, ParseUser(user));
    access.credentials = std::make_shared<Credentials>(std::move(loader), clock_);
    return access;
  }

 private:
  std::string Path(const std::string& path) const {
    return path.empty() || path[0] == '/' ? path : (std::filesystem::path(folder_) / path).string();
  }
  // NAME-data inline, or the file NAME.
  Result<std::string> Material(const YAML::Node& node, const std::string& name) const {
    if (const std::string data = Text(node, (name + "-data").c_str()); !data.empty()) return DecodeBase64(name + "-data", data);
    if (const std::string path = Text(node, name.c_str()); !path.empty()) return ReadFile(Path(path));
    return std::string();
  }
  Result<Credentials::Loader> ParseUser(const YAML::Node& user) const {
    for (const char* name : {"auth-provider", "username", "as"}) {
      if (user[name]) return UnimplementedError(std::string("kubeconfig: ") + name + " is not supported");
    }
    if (const YAML::Node exec = user["exec"]; exec) {
      ExecPlugin plugin{.api_version = Text(exec, "apiVersion"), .command = Text(exec, "command"), .args = {}, .env = {}};
      if (plugin.command.empty()) return InvalidArgumentError("kubeconfig: exec has no command");
      if (plugin.command.find('/') != std::string::npos) plugin.command = Path(plugin.command);
      for (const YAML::Node& arg : exec["args"]) plugin.args.push_back(arg.as<std::string>());
      for (const YAML::Node& entry : exec["env"]) plugin.env.emplace_back(Text(entry, "name"), Text(entry, "value"));
      return RunPlugin(std::move(plugin));
    }
    if (const std::string file = Text(user, "tokenFile"); !file.empty()) return TokenFile(Path(file));
    Identity identity;
    identity.bearer_token = Text(user, "token");
    ASSIGN_OR_RETURN(identity.certificate_pem, Material(user, "client-certificate"));
    ASSIGN_OR_RETURN(identity.key_pem, Material(user, "client-key"));
    if (identity.certificate_pem.empty() != identity.key_pem.empty()) {
      return InvalidArgumentError("kubeconfig: a client certificate needs its key, and a key its certificate");
    }
    return StaticIdentity(std::move(identity));
  }

  const std::string folder_;
  const Clock& clock_;
};
}  // namespace

Result<ClusterAccess> ParseKubeconfig(const std::string& yaml, const std::string& folder, const std::string& context, const Clock& clock) {
  try {
    return Parser(folder, clock).Parse(YAML::Load(yaml), context);
  } catch (const YAML::Exception& e) {
    return InvalidArgumentError(std::string("kubeconfig: ") + e.what());
  }
}

Result<ClusterAccess> InCluster(const Clock& clock, const std::string& folder) {
  const char* port = std::getenv("KUBERNETES_SERVICE_PORT");
  if (std::getenv("KUBERNETES_SERVICE_HOST") == nullptr || port == nullptr) return NotFoundError("not in a pod: KUBERNETES_SERVICE_HOST is not set");
  ClusterAccess access;
  access.server = std::string("https://kubernetes.default.svc:") + port;
  access.ca_file = folder + "/ca.crt";
  ASSIGN_OR_RETURN(access.namespace_name, ReadFile(folder + "/namespace"));
  access.credentials = std::make_shared<Credentials>(TokenFile(folder + "/token"), clock);
  const Result<Identity> identity = access.credentials->Get();
  if (!identity.ok()) return identity.status();
  return access;
}

Result<ClusterAccess> FindCluster(const std::string& path, const std::string& context, const Clock& clock) {
  std::string file = path;
  if (const char* env = std::getenv("KUBECONFIG"); file.empty() && env != nullptr) file = env;
  if (file.empty()) {
    if (std::getenv("KUBERNETES_SERVICE_HOST") != nullptr) return InCluster(clock);
    const char* home = std::getenv("HOME");
    file = std::string(home != nullptr ? home : "") + "/.kube/config";
  }
  ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  return ParseKubeconfig(text, std::filesystem::path(file).parent_path().string(), context, clock);
}

}  // namespace qwen::kube

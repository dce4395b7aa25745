// controller/kube/kubeconfig.h — where the API server is and who we are: from a pod's service account, or from a kubeconfig.
// Thread-safe: no state.
#pragma once
#include <string>

#include "controller/kube/transport.h"
#include "stage/base/clock.h"
#include "stage/base/status.h"

namespace qwen::kube {

// The kubeconfig at `path` if not empty, else $KUBECONFIG (one file), else the pod's service account, else ~/.kube/config.
// `context` empty: current-context. `clock` outlives what is returned.
Result<ClusterAccess> FindCluster(const std::string& path, const std::string& context, const Clock& clock);

// kubernetes.default.svc (not the service's address, which may be an IPv6 literal) with the token, CA and namespace that the
// kubelet mounts and renews. kNotFound: this is no pod.
Result<ClusterAccess> InCluster(const Clock& clock, const std::string& folder = "/var/run/secrets/kubernetes.io/serviceaccount");

// Understands client certificates, tokens, token files and exec plugins, inline or as files (relative ones to `folder`).
// kInvalidArgument names what is wrong; kUnimplemented: auth-provider, username/password, tls-server-name, proxy-url, which
// current tools do not write.
Result<ClusterAccess> ParseKubeconfig(const std::string& yaml, const std::string& folder, const std::string& context, const Clock& clock);

}  // namespace qwen::kube

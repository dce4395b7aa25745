// Goal: the CRD and the codec are the same contract. Defaults, bounds and field names are read out of crds/qwenpipeline.yaml and held
// against what the codec does; every example manifest is one that it accepts.
#include "controller/ctl/manifest.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "controller/api/codec.h"
#include "controller/ctl/inspect_command.h"

namespace qwen::ctl {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}
Json Schema() {
  const auto json = YamlToJson(ReadFile("crds/qwenpipeline.yaml"));
  EXPECT_TRUE(json.ok()) << json.status().ToString();
  return Json::parse(*json)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
}
// What the API server does: fills in defaults, outermost first.
void ApplyDefaults(const Json& schema, Json& value) {
  if (!schema.contains("properties") || !value.is_object()) return;
  for (const auto& [key, property] : schema["properties"].items()) {
    if (!value.contains(key) && property.contains("default")) value[key] = property["default"];
    if (value.contains(key)) ApplyDefaults(property, value[key]);
  }
}
Json Manifest(const Json& spec) {
  return {{"apiVersion", "qwenpipeline.dev/v1alpha1"}, {"kind", "QwenPipeline"}, {"metadata", {{"name", "x"}}}, {"spec", spec}};
}
// With what some values ask for beside them.
const Json kSpec = {{"model", {{"id", "m"}, {"source", {{"path", "/p"}}}}}, {"stages", {{"count", 2}}}, {"transport", {{"rdma", {{"resource", "rdma/hca"}}}}},
                    {"scheduling", {{"queueName", "q"}}}, {"weights", {{"claimPrefix", "shard"}, {"size", "1Gi"}}}};

void EachProperty(const Json& schema, const std::string& pointer, const std::function<void(const std::string&, const Json&)>& visit) {
  if (!schema.contains("properties")) return;
  for (const auto& [key, property] : schema["properties"].items()) {
    visit(pointer + "/" + key, property);
    EachProperty(property, pointer + "/" + key, visit);
  }
}
std::string Dotted(std::string pointer) {
  for (char& c : pointer)
    if (c == '/') c = '.';
  return "spec" + pointer;
}

TEST(Crd, ItsDefaultsAreTheCodecs) {
  Json expected = kSpec;
  ApplyDefaults(Schema(), expected);
  const auto parsed = api::ParsePipeline(Manifest(kSpec).dump());
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(Json::parse(api::PipelineToJson(*parsed))["spec"], expected);
}

TEST(Crd, ItsIntegerBoundsAreTheCodecs) {
  int checked = 0;
  EachProperty(Schema(), "", [&](const std::string& pointer, const Json& property) {
    if (property.value("type", "") != "integer") return;
    const int64_t minimum = property["minimum"], maximum = property["maximum"];
    for (const int64_t wrong : {minimum - 1, maximum + 1}) {
      Json spec = kSpec;
      spec[Json::json_pointer(pointer)] = wrong;
      const auto parsed = api::ParsePipeline(Manifest(spec).dump());
      EXPECT_EQ(parsed.ok() ? "accepted" : parsed.status().message(), Dotted(pointer) + ": must be an integer in [" + std::to_string(minimum) + ", " +
                                                                           std::to_string(maximum) + "], found " + std::to_string(wrong));
    }
    ++checked;
  });
  EXPECT_GE(checked, 12);
}

TEST(Crd, ItsFieldsAreTheOnesThatTheCodecKnows) {
  int checked = 0;
  EachProperty(Schema(), "", [&](const std::string& pointer, const Json& property) {
    Json spec = kSpec;
    if (pointer == "/model/source/path" || pointer == "/stages/count") return;
    if (pointer.find("/persistentVolumeClaim/") != std::string::npos) return;  // below: needs its parent
    spec[Json::json_pointer(pointer)] = nullptr;  // absent, but named
    const auto parsed = api::ParsePipeline(Manifest(spec).dump());
    if (!parsed.ok()) {
      EXPECT_EQ(parsed.status().message().find("unknown field"), std::string::npos) << parsed.status().ToString();
    }
    ++checked;
    if (!property.contains("enum")) return;
    for (const Json& choice : property["enum"]) {
      spec[Json::json_pointer(pointer)] = choice;
      EXPECT_TRUE(api::ParsePipeline(Manifest(spec).dump()).ok()) << pointer << " " << choice;
    }
  });
  EXPECT_GE(checked, 25);
  // The other way round: what the codec writes is in the schema.
  Json full = kSpec;
  full["model"]["source"] = {{"persistentVolumeClaim", {{"claimName", "c"}, {"subPath", "s"}}}};
  full["model"]["maxModelLen"] = 5;
  full["stages"] = {{"list", {{{"name", "a"}, {"layers", {{"begin", 0}, {"end", 4}}}, {"env", {{{"name", "A"}, {"value", "b"}}}}}}}};
  const Json pod = {{"image", "i"}, {"env", {{{"name", "A"}, {"value", "b"}}}}, {"resources", {{"limits", {{"cpu", 1}}}}}, {"nodeSelector", {{"a", "b"}}},
                    {"tolerations", {{{"key", "k"}}}}, {"volumes", {{{"name", "v"}}}}, {"volumeMounts", {{{"name", "v"}, {"mountPath", "/v"}}}},
                    {"imagePullSecrets", {{{"name", "r"}}}}, {"annotations", {{"a", "b"}}}, {"priorityClassName", "p"}};
  full["head"] = full["stages"]["template"] = full["weights"]["template"] = pod;
  full["stages"]["list"][0].update(pod);
  full["engine"] = {{"kvCacheTokens", 100}, {"threads", 2}};
  full["server"] = {{"apiKeys", {{"secretName", "s"}, {"file", "f"}}}, {"allowedImageHosts", {"h"}}};
  const auto parsed = api::ParsePipeline(Manifest(full).dump());
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  const std::function<void(const Json&, const Json&, const std::string&)> contained = [&](const Json& schema, const Json& value, const std::string& where) {
    if (value.is_array()) {
      for (const Json& item : value) contained(schema["items"], item, where + "[]");
    } else if (value.is_object() && schema.contains("properties")) {  // else a map of anybody's keys
      for (const auto& [key, item] : value.items()) {
        ASSERT_TRUE(schema["properties"].contains(key)) << where << "." << key;
        contained(schema["properties"][key], item, where + "." + key);
      }
    }
  };
  contained(Schema(), Json::parse(api::PipelineToJson(*parsed))["spec"], "spec");
}

TEST(Manifest, EveryExampleIsAccepted) {
  int found = 0;
  for (const auto& item : fs::directory_iterator("docs/examples")) {
    if (item.path().extension() != ".yaml") continue;
    const auto pipeline = LoadManifest(item.path().string());
    EXPECT_TRUE(pipeline.ok()) << pipeline.status().ToString();
    ++found;
  }
  EXPECT_GE(found, 2);
}

TEST(Manifest, RelativePathsCountFromTheManifestsFolder) {
  const auto pipeline = LoadManifest("docs/examples/digits.yaml");
  ASSERT_TRUE(pipeline.ok()) << pipeline.status().ToString();
  EXPECT_EQ(*pipeline->spec.model.source.path, fs::absolute("docs/examples/digits-checkpoint").string());
  EXPECT_EQ(LoadManifest("docs/examples/absent.yaml").status().code(), StatusCode::kNotFound);
}

TEST(Inspect, TheDemoCheckpointFitsAndAChangedConfigIsReportedTensorByTensor) {
  const auto good = Inspect("docs/examples/digits-checkpoint", false);
  ASSERT_TRUE(good.ok()) << good.status().ToString();
  EXPECT_TRUE(good->fits) << good->text;
  EXPECT_NE(good->text.find("0 missing, 0 mismatched, 0 extra"), std::string::npos) << good->text;
  EXPECT_NE(good->text.find("qwen3_vl_moe"), std::string::npos);

  const std::string dir = ::testing::TempDir() + "/inspect";
  fs::remove_all(dir);
  fs::copy("docs/examples/digits-checkpoint", dir);
  Json config = Json::parse(ReadFile(dir + "/config.json"));
  config["text_config"]["num_hidden_layers"] = config["text_config"]["num_hidden_layers"].get<int>() + 1;
  config["text_config"]["num_key_value_heads"] = 1;
  std::ofstream(dir + "/config.json", std::ios::trunc) << config.dump();
  const auto bad = Inspect(dir, false);
  ASSERT_TRUE(bad.ok()) << bad.status().ToString();
  EXPECT_FALSE(bad->fits);
  EXPECT_NE(bad->text.find("self_attn.k_proj.weight: expected [32, 64], found [64, 64] in model.safetensors"), std::string::npos) << bad->text;
  EXPECT_NE(bad->text.find("layers.8.input_layernorm.weight: missing, expected [64]"), std::string::npos) << bad->text;
  EXPECT_EQ(Inspect(dir + "/absent", false).status().code(), StatusCode::kNotFound);
  fs::remove_all(dir);
}

}  // namespace
}  // namespace qwen::ctl

#include "controller/ctl/manifest.h"

#include <yaml-cpp/yaml.h>

#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "controller/api/codec.h"

namespace qwen::ctl {
namespace {

using Json = nlohmann::json;

constexpr size_t kManifestBytesMax = 1 << 20;
constexpr int kDepthMax = 32;
constexpr int kNodesMax = 100000;  // anchors can make a small file very large

std::string Where(const YAML::Mark& mark) { return "line " + std::to_string(mark.line + 1) + ", column " + std::to_string(mark.column + 1); }

// YAML 1.2 core schema for plain scalars.
Json Scalar(const YAML::Node& node) {
  const std::string& text = node.Scalar();
  if (node.Tag() == "!") return text;  // quoted
  if (text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL") return nullptr;
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  const char* const end = text.data() + text.size();
  const char* const begin = text[0] == '+' ? text.data() + 1 : text.data();
  int64_t integer = 0;
  if (const auto parsed = std::from_chars(begin, end, integer); parsed.ec == std::errc() && parsed.ptr == end) return integer;
  double number = 0;
  if (const auto parsed = std::from_chars(begin, end, number); parsed.ec == std::errc() && parsed.ptr == end && std::isfinite(number)) return number;
  return text;
}

Status Convert(const YAML::Node& node, int depth, int& nodes, Json& out) {
  if (depth > kDepthMax) return InvalidArgumentError("manifest: nested deeper than 32 at " + Where(node.Mark()));
  if (++nodes > kNodesMax) return InvalidArgumentError("manifest: more than 100,000 values");
  switch (node.Type()) {
    case YAML::NodeType::Undefined:
    case YAML::NodeType::Null: out = nullptr; return OkStatus();
    case YAML::NodeType::Scalar: out = Scalar(node); return OkStatus();
    case YAML::NodeType::Sequence:
      out = Json::array();
      for (const auto& item : node) RETURN_IF_ERROR(Convert(item, depth + 1, nodes, out.emplace_back()));
      return OkStatus();
    case YAML::NodeType::Map:
      out = Json::object();
      for (const auto& item : node) {
        if (!item.first.IsScalar()) return InvalidArgumentError("manifest: a key must be a string at " + Where(item.first.Mark()));
        const std::string key = item.first.Scalar();
        if (out.contains(key)) return InvalidArgumentError("manifest: key " + key.substr(0, 80) + " appears twice at " + Where(item.first.Mark()));
        RETURN_IF_ERROR(Convert(item.second, depth + 1, nodes, out[key]));
      }
      return OkStatus();
  }
  return InternalError("manifest: unknown kind of YAML node");
}

}  // namespace

Result<std::string> YamlToJson(std::string_view yaml) {
  if (yaml.size() > kManifestBytesMax) return InvalidArgumentError("manifest: larger than 1 MiB");
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(yaml));
    if (documents.size() != 1) return InvalidArgumentError("manifest: must hold one document, found " + std::to_string(documents.size()));
    Json json;
    int nodes = 0;
    RETURN_IF_ERROR(Convert(documents[0], 0, nodes, json));
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
  } catch (const YAML::Exception& error) {
    return InvalidArgumentError("manifest: " + error.msg + " at " + Where(error.mark));
  }
}

Result<api::QwenPipeline> LoadManifest(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFoundError(path + ": cannot be opened");
  std::string text(kManifestBytesMax + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  auto json = YamlToJson(text);
  if (!json.ok()) return json.status().WithContext(path);
  auto pipeline = api::ParsePipeline(*json);
  if (!pipeline.ok()) return pipeline.status().WithContext(path);
  const std::filesystem::path folder = std::filesystem::absolute(path).parent_path();
  for (std::optional<std::string>* field : {&pipeline->spec.model.source.path, &pipeline->spec.server.api_keys.file})
    if (*field) *field = (folder / **field).lexically_normal().string();  // an absolute path replaces the folder
  return pipeline;
}

}  // namespace qwen::ctl

#include "controller/ctl/inspect_command.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "controller/ctl/commands.h"
#include "controller/ctl/units.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"
#include "stage/contract/pod_contract.h"
#include "stage/weights/checkpoint.h"

namespace qwen::ctl {
namespace {

namespace fs = std::filesystem;

constexpr size_t kLinesMax = 40;  // of each kind

std::string ShapeText(const contract::ModelShape& s) {
  std::string out = "family      " + s.model_type + "\n";
  out += "dtype       " + std::string(contract::DtypeName(s.dtype));
  if (s.quantization) out += ", linear weights in FP8 with blocks of " + std::to_string(s.quantization->block_rows) + "x" + std::to_string(s.quantization->block_columns);
  out += "\ndecoder     " + std::to_string(s.layers) + " layers, hidden " + std::to_string(s.hidden) + ", " + std::to_string(s.heads) + " heads and " +
         std::to_string(s.kv_heads) + " KV heads of " + std::to_string(s.head_dim) + ", vocabulary " + FormatCount(s.vocab) + ", positions " + FormatCount(s.max_positions) +
         (s.tie_embeddings ? ", tied head" : "") + "\n";
  if (s.moe) {
    out += "experts     " + std::to_string(s.moe->experts) + " of " + std::to_string(s.moe->intermediate) + ", top-" + std::to_string(s.moe->experts_per_token) + "\n";
  } else {
    out += "mlp         " + std::to_string(s.intermediate) + "\n";
  }
  if (s.vision) {
    std::string taps;
    for (const int32_t layer : s.vision->deepstack_layers) taps += (taps.empty() ? "" : ", ") + std::to_string(layer);
    out += "vision      " + std::to_string(s.vision->depth) + " blocks, hidden " + std::to_string(s.vision->hidden) + ", patches of " + std::to_string(s.vision->patch) +
           ", DeepStack after " + (taps.empty() ? "none" : taps) + "\n";
  }
  return out;
}

void AddLines(const char* what, const std::vector<std::string>& lines, std::string& out) {
  for (size_t i = 0; i < lines.size() && i < kLinesMax; ++i) out += std::string("  ") + what + "  " + lines[i] + "\n";
  if (lines.size() > kLinesMax) out += std::string("  ") + what + "  ... and " + std::to_string(lines.size() - kLinesMax) + " more\n";
}

// Which part of the model a folder holds: stage.json of an export, else all of it.
Result<weights::StageSpec> SpecOf(const std::string& dir, const contract::ModelShape& shape) {
  std::ifstream file(dir + "/stage.json");
  if (!file) return weights::StageSpec{.layers = {0, shape.layers}, .index = 0, .stages = 1};
  const auto json = nlohmann::json::parse(file, nullptr, false);
  weights::StageSpec spec;
  const auto integer = [&](const nlohmann::json& value, int32_t& out) { return value.is_number_integer() && ((out = value.get<int32_t>()), true); };
  if (json.is_object() && json.contains("stage") && json.contains("stages") && json.contains("layers") && json["layers"].is_array() && json["layers"].size() == 2 &&
      integer(json["stage"], spec.index) && integer(json["stages"], spec.stages) && integer(json["layers"][0], spec.layers.begin) &&
      integer(json["layers"][1], spec.layers.end) && 0 <= spec.index && spec.index < spec.stages && 0 <= spec.layers.begin && spec.layers.begin < spec.layers.end &&
      spec.layers.end <= shape.layers)
    return spec;
  return DataLossError(dir + "/stage.json: must say stage, stages and layers within the model");
}

Status InspectFolder(const std::string& dir, bool verify, Inspection& out) {
  ASSIGN_OR_RETURN(const contract::ModelShape shape, contract::LoadModelShape(dir));
  ASSIGN_OR_RETURN(const weights::StageSpec spec, SpecOf(dir, shape));
  ASSIGN_OR_RETURN(weights::Checkpoint checkpoint, weights::Checkpoint::Open(dir));
  ASSIGN_OR_RETURN(const weights::StageTensors stage, checkpoint.ResolveStage(shape, spec));
  std::map<std::string, int> dtypes;
  int transposed = 0;
  for (const weights::Entry& entry : stage.entries) {
    if (entry.alias_of.empty()) ++dtypes[std::string(weights::StoredDtypeName(entry.dtype))];
    transposed += entry.transform != weights::Transform::kNone;
  }
  const weights::Report& report = stage.report;
  out.text += dir + "\n" + ShapeText(shape);
  if (spec.stages > 1) out.text += "stage       " + std::to_string(spec.index) + " of " + std::to_string(spec.stages) + ", layers " + ToString(spec.layers) + "\n";
  std::string stored;
  for (const auto& [name, count] : dtypes) stored += (stored.empty() ? "" : ", ") + std::to_string(count) + " in " + name;
  out.text += "tensors     " + std::to_string(report.loaded.size()) + " loaded (" + FormatBytes(static_cast<double>(report.bytes)) + "; " + stored + "), " +
              std::to_string(report.missing.size()) + " missing, " + std::to_string(report.mismatched.size()) + " mismatched, " + std::to_string(report.unexpected.size()) +
              " extra\n";
  if (transposed > 0) out.text += "experts     stored input-major as on the hub; transposed while loading\n";
  AddLines("mismatched", report.mismatched, out.text);
  AddLines("missing   ", report.missing, out.text);
  AddLines("extra     ", report.unexpected, out.text);
  out.fits = out.fits && report.ok();
  if (verify && checkpoint.is_stage_export()) {
    const Status checked = checkpoint.VerifySha256();
    out.text += "sha256      " + (checked.ok() ? std::string("all tensors match the manifest") : checked.message()) + "\n";
    out.fits = out.fits && checked.ok();
  } else if (verify) {
    out.text += "sha256      no weights_manifest.json: nothing to compare with\n";
  }
  return OkStatus();
}

}  // namespace

Result<Inspection> Inspect(const std::string& dir, bool verify) {
  std::error_code error;
  if (!fs::is_directory(dir, error)) return NotFoundError(dir + ": not a folder");
  std::vector<std::string> folders;
  for (const auto& item : fs::directory_iterator(dir, error))
    if (item.is_directory() && item.path().filename().string().starts_with("stage-") && fs::exists(item.path() / "hf_config.json")) folders.push_back(item.path().string());
  std::sort(folders.begin(), folders.end());
  if (folders.empty()) folders.push_back(dir);
  Inspection out{.fits = true};
  for (const std::string& folder : folders) {
    if (!out.text.empty()) out.text += "\n";
    RETURN_IF_ERROR(InspectFolder(folder, verify, out));
  }
  return out;
}

void AddInspect(CLI::App& app, int& exit_code) {
  struct Flags {
    std::string dir;
    bool verify = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("inspect", "report what a checkpoint holds and whether it fits its config");
  command->add_option("dir", flags->dir, "checkpoint, export, or one stage's folder")->required();
  command->add_flag("--verify", flags->verify, "also compare the sha256 of every tensor (exports only)");
  command->callback([flags, &exit_code] {
    const auto inspection = Inspect(flags->dir, flags->verify);
    if (!inspection.ok()) {
      exit_code = Report(inspection.status());
      return;
    }
    std::fputs(inspection->text.c_str(), stdout);
    exit_code = inspection->fits ? 0 : static_cast<int>(contract::ExitCode::kBadCheckpoint);
  });
}

}  // namespace qwen::ctl

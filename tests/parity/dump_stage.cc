// qp_dump_stage: runs a checkpoint through S StageModels in one process and writes what the parity tests compare.
//
//   qp_dump_stage --checkpoint DIR --request request.json --out dump.safetensors
//                 [--dtype float32|bfloat16] [--stages 0:2,2:4] [--steps 16] [--chunk 0] [--block-tokens 16]
//                 [--grouping span|batch] [--ties lowest|topk] [--threads 0]
//
// request.json:
//   {"prompts": [{"tokens": [1, 2, 3],               token ids, one placeholder per merged visual token
//                 "positions": [[0,0,0], ...],       optional, (t, h, w) per token; without it i, i, i
//                 "position_delta": 0,               optional; decode position of token i is i + delta on all axes
//                 "vision": [{"grid": [1, 4, 6],     optional; t, h, w in patches
//                             "patches": "img.u8",   raw uint8 file beside the request: (t*h*w, 3*2*16*16), see step_plan.h
//                             "runs": [[1, 6]]}]}]}  (first token, count) of its placeholders in `tokens`, in order
//
// --ties topk takes the reference's (undefined, but on one machine reproducible) choice among equal router probabilities.
// All prompts run side by side in one batch, `chunk` prompt tokens of each per plan (0: the whole prompt), then greedy
// decode steps together until every prompt has `steps` tokens. --stages gives the layer ranges, default one stage.
//
// dump.safetensors, for prompt P (n = prompt tokens + steps - 1 tokens that were computed):
//   pP.tokens (steps) I64       the greedy tokens
//   pP.logits (steps, vocab)    float32, the row that each token was chosen from
//   pP.hidden.L (n, H)          float32, the residual stream before layer L, after DeepStack; L == layers: before the final norm
//   pP.vision.J (1+taps, m, H)  float32, features of its J-th vision input: merged, then the DeepStack taps
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "stage/contract/model_shape.h"
#include "stage/model/stage_model.h"
#include "stage/vision/vision_tower.h"
#include "stage/weights/checkpoint.h"

namespace qwen {
namespace {

using Json = nlohmann::json;

struct Flags {
  std::string checkpoint, request, out, dtype = "float32", stages, grouping = "span", ties = "lowest";
  int32_t steps = 16, chunk = 0, block_tokens = 16, threads = 0;
};

struct Prompt {
  std::vector<int32_t> tokens;              // grows by the sampled ones
  std::vector<step::Position> positions;    // of the prompt
  int32_t position_delta = 0;
  std::vector<std::pair<step::VisionInput, std::vector<std::pair<int32_t, int32_t>>>> vision;
  std::vector<step::BlockId> blocks;
  int32_t prompt_tokens = 0, computed = 0;
  std::vector<int64_t> generated;
  std::vector<at::Tensor> logits;
  std::map<int32_t, std::vector<at::Tensor>> hidden;  // by layer

  step::Position PositionAt(int32_t i) const {
    if (i < prompt_tokens) return positions[i];
    const int32_t p = i + position_delta;
    return {p, p, p};
  }
};

std::string ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  QP_CHECK(file.good()) << path.string();
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<Prompt> ReadRequest(const std::string& path, const Flags& flags) {
  const Json request = Json::parse(ReadFile(path));
  std::vector<Prompt> prompts;
  step::VisionId next_id = 1;
  int32_t next_block = 0;
  for (const Json& item : request.at("prompts")) {
    Prompt prompt;
    prompt.tokens = item.at("tokens").get<std::vector<int32_t>>();
    prompt.prompt_tokens = static_cast<int32_t>(prompt.tokens.size());
    prompt.position_delta = item.value("position_delta", 0);
    for (int32_t i = 0; i < prompt.prompt_tokens; ++i) {
      if (item.contains("positions")) {
        const auto p = item["positions"].at(i).get<std::array<int32_t, 3>>();
        prompt.positions.push_back({p[0], p[1], p[2]});
      } else {
        prompt.positions.push_back({i, i, i});
      }
    }
    for (const Json& vision : item.value("vision", Json::array())) {
      step::VisionInput input;
      input.id = next_id++;
      input.grid = vision.at("grid").get<std::array<int32_t, 3>>();
      const std::string bytes =
          ReadFile(std::filesystem::path(path).parent_path() / vision.at("patches").get<std::string>());
      input.patches.assign(bytes.begin(), bytes.end());
      prompt.vision.emplace_back(std::move(input), vision.at("runs").get<std::vector<std::pair<int32_t, int32_t>>>());
    }
    const int32_t total = prompt.prompt_tokens + flags.steps;
    for (int32_t i = 0; i < (total + flags.block_tokens - 1) / flags.block_tokens; ++i) prompt.blocks.push_back(next_block++);
    // Not ascending on purpose: the block table must matter.
    std::reverse(prompt.blocks.begin(), prompt.blocks.end());
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

// The part of every placeholder run that lies in tokens [begin, begin + count) of the prompt.
std::vector<step::VisionSlice> Slices(const Prompt& prompt, int32_t begin, int32_t count) {
  std::vector<step::VisionSlice> slices;
  for (const auto& [input, runs] : prompt.vision) {
    int32_t feature = 0;
    for (const auto& [first, length] : runs) {
      const int32_t from = std::max(first, begin), to = std::min(first + length, begin + count);
      if (from < to) slices.push_back({input.id, feature + from - first, from - begin, to - from});
      feature += length;
    }
  }
  std::sort(slices.begin(), slices.end(), [](const auto& a, const auto& b) { return a.span_offset < b.span_offset; });
  return slices;
}

// The next plan: a prompt chunk or one decode token of every prompt that is not done. Empty when all are.
step::StepPlan NextPlan(const std::vector<Prompt>& prompts, const Flags& flags, uint64_t number) {
  step::StepPlan plan;
  plan.step = number;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const Prompt& prompt = prompts[i];
    if (static_cast<int32_t>(prompt.generated.size()) >= flags.steps) continue;
    const int32_t known = static_cast<int32_t>(prompt.tokens.size());
    const int32_t left = known - prompt.computed;
    const int32_t count = flags.chunk > 0 ? std::min(left, flags.chunk) : left;
    step::SequenceSpan span{.sequence = i + 1, .slot = static_cast<int32_t>(i), .begin = prompt.computed};
    for (int32_t t = prompt.computed; t < prompt.computed + count; ++t) {
      span.tokens.push_back(prompt.tokens[t]);
      span.positions.push_back(prompt.PositionAt(t));
    }
    const int32_t blocks = (prompt.computed + count + flags.block_tokens - 1) / flags.block_tokens;
    span.blocks.assign(prompt.blocks.begin(), prompt.blocks.begin() + blocks);
    span.vision = Slices(prompt, prompt.computed, count);
    span.sample = prompt.computed + count == known;
    plan.spans.push_back(std::move(span));
  }
  return plan;
}

std::vector<contract::LayerRange> ParseStages(const std::string& text, int32_t layers) {
  if (text.empty()) return {{0, layers}};
  std::vector<contract::LayerRange> ranges;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) ranges.push_back(contract::ParseLayerRange(part).value());
  return ranges;
}

// float32 and int64 tensors, in the safetensors format (stage/weights/safetensors.h).
void WriteSafetensors(const std::string& path, const std::map<std::string, at::Tensor>& tensors) {
  Json header = Json::object();
  int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.scalar_type() == at::kLong ? "I64" : "F32"},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {offset, offset + static_cast<int64_t>(tensor.nbytes())}}};
    offset += static_cast<int64_t>(tensor.nbytes());
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::ofstream file(path, std::ios::binary);
  const uint64_t length = text.size();
  file.write(reinterpret_cast<const char*>(&length), sizeof(length));
  file << text;
  for (const auto& [name, tensor] : tensors) {
    file.write(static_cast<const char*>(tensor.const_data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  }
  QP_CHECK(file.good()) << path;
}

Status Run(const Flags& flags) {
  if (flags.threads > 0) at::set_num_threads(flags.threads);
  ASSIGN_OR_RETURN(const contract::ModelShape shape, contract::LoadModelShape(flags.checkpoint));
  std::vector<Prompt> prompts = ReadRequest(flags.request, flags);
  const at::ScalarType dtype = flags.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  int32_t block_count = 0;
  for (const Prompt& prompt : prompts) block_count += static_cast<int32_t>(prompt.blocks.size());

  step::StepPlan plan;                            // the one being run
  std::map<int32_t, at::Tensor> residual;         // by layer, of the plan being run
  std::map<std::string, at::Tensor> dump;
  const vision::VisionOptions vision_options{.dtype = dtype};
  const std::vector<contract::LayerRange> ranges = ParseStages(flags.stages, shape.layers);
  std::vector<std::unique_ptr<model::StageModel>> stages;
  for (size_t s = 0; s < ranges.size(); ++s) {
    ASSIGN_OR_RETURN(weights::Checkpoint checkpoint, weights::Checkpoint::Open(flags.checkpoint));
    model::StageModelOptions options;
    options.layers = ranges[s];
    options.stage = static_cast<int32_t>(s);
    options.stages = static_cast<int32_t>(ranges.size());
    options.dtype = dtype;
    options.block_tokens = flags.block_tokens;
    options.block_count = block_count;
    options.grouping = flags.grouping == "batch" ? model::RowGrouping::kWholeBatch : model::RowGrouping::kPerSpan;
    options.router_ties = flags.ties == "topk" ? ops::RouterTies::kTopk : ops::RouterTies::kLowestExpert;
    if (shape.vision) options.vision = vision::MakeEncoderFactory(shape, vision_options);
    options.on_hidden = [&](int32_t layer, const at::Tensor& hidden) { residual[layer] = hidden.to(at::kFloat).clone(); };
    ASSIGN_OR_RETURN(auto stage, model::StageModel::Load(checkpoint, shape, options));
    stages.push_back(std::move(stage));
  }
  if (shape.vision) {  // once more, apart from the stages, to see the features themselves
    ASSIGN_OR_RETURN(weights::Checkpoint checkpoint, weights::Checkpoint::Open(flags.checkpoint));
    ASSIGN_OR_RETURN(const weights::TensorMap tensors,
                     weights::LoadTensors(checkpoint, shape, {.spec = {.layers = {0, shape.layers}}, .dtype = dtype}));
    ASSIGN_OR_RETURN(const vision::VisionTower tower, vision::VisionTower::Create(shape, vision_options, tensors));
    for (size_t p = 0; p < prompts.size(); ++p) {
      for (size_t j = 0; j < prompts[p].vision.size(); ++j) {
        ASSIGN_OR_RETURN(const at::Tensor features, tower.Encode(prompts[p].vision[j].first));
        dump["p" + std::to_string(p) + ".vision." + std::to_string(j)] = features.to(at::kFloat).contiguous();
        RETURN_IF_ERROR(stages.front()->AddVision(prompts[p].vision[j].first));
      }
    }
  }

  for (uint64_t number = 0;; ++number) {
    plan = NextPlan(prompts, flags, number);
    if (plan.spans.empty()) break;
    model::StageOutput output;
    for (const auto& stage : stages) {
      ASSIGN_OR_RETURN(output, stage->Forward(plan, output.activations));
    }
    int64_t row = 0, sample = 0;
    for (const step::SequenceSpan& span : plan.spans) {
      Prompt& prompt = prompts[span.slot];
      const int64_t count = static_cast<int64_t>(span.tokens.size());
      for (const auto& [layer, hidden] : residual) prompt.hidden[layer].push_back(hidden.narrow(0, row, count));
      row += count;
      prompt.computed += static_cast<int32_t>(count);
      if (!span.sample) continue;
      const at::Tensor logits = output.logits[sample++].to(at::kFloat);
      const int64_t token = logits.argmax().item<int64_t>();
      prompt.logits.push_back(logits);
      prompt.generated.push_back(token);
      prompt.tokens.push_back(static_cast<int32_t>(token));
    }
  }
  for (size_t p = 0; p < prompts.size(); ++p) {
    const std::string prefix = "p" + std::to_string(p) + ".";
    dump[prefix + "tokens"] = at::tensor(prompts[p].generated, at::kLong);
    dump[prefix + "logits"] = at::stack(prompts[p].logits).contiguous();
    for (const auto& [layer, rows] : prompts[p].hidden) {
      dump[prefix + "hidden." + std::to_string(layer)] = at::cat(rows, 0).contiguous();
    }
  }
  WriteSafetensors(flags.out, dump);
  return OkStatus();
}

}  // namespace
}  // namespace qwen

int main(int argc, char** argv) {
  qwen::Flags flags;
  CLI::App app("Runs a checkpoint through StageModels in one process and dumps what the parity tests compare.");
  app.add_option("--checkpoint", flags.checkpoint)->required();
  app.add_option("--request", flags.request)->required();
  app.add_option("--out", flags.out)->required();
  app.add_option("--dtype", flags.dtype)->check(CLI::IsMember({"float32", "bfloat16"}));
  app.add_option("--stages", flags.stages, "layer ranges, 0:2,2:4");
  app.add_option("--steps", flags.steps)->check(CLI::PositiveNumber);
  app.add_option("--chunk", flags.chunk)->check(CLI::NonNegativeNumber);
  app.add_option("--block-tokens", flags.block_tokens)->check(CLI::PositiveNumber);
  app.add_option("--grouping", flags.grouping)->check(CLI::IsMember({"span", "batch"}));
  app.add_option("--ties", flags.ties, "equal router probabilities")->check(CLI::IsMember({"lowest", "topk"}));
  app.add_option("--threads", flags.threads, "intra-op threads, 0 = default");
  CLI11_PARSE(app, argc, argv);
  const qwen::Status status = qwen::Run(flags);
  if (!status.ok()) std::fprintf(stderr, "qp_dump_stage: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

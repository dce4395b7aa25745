// tests/parity/preprocess_dump.cc — runs stage/vision/preprocess on what preprocess_parity.py asks for.
//
// usage: preprocess_dump < requests > answers. One JSON object a line each way; pixels and patches go through files.
// An answer is {"error": message} when a function gave a Status.
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stage/vision/preprocess/image_decode.h"
#include "stage/vision/preprocess/patches.h"
#include "stage/vision/preprocess/positions.h"
#include "stage/vision/preprocess/processor_config.h"
#include "stage/vision/preprocess/prompt.h"
#include "stage/vision/preprocess/resize.h"
#include "stage/vision/preprocess/video_decode.h"

namespace {

using Json = nlohmann::json;
using Grid = std::array<int32_t, 3>;
namespace pre = qwen::preprocess;

std::vector<char> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  QP_CHECK(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}
void WriteFile(const std::string& path, const std::vector<uint8_t>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  QP_CHECK(file.good()) << path;
}

Json Error(const qwen::Status& status) { return {{"error", status.ToString()}}; }

Json Decode(const Json& request) {
  const auto file = ReadFile(request["file"]);
  const auto image = pre::DecodeImage(std::as_bytes(std::span(file)));
  if (!image.ok()) return Error(image.status());
  WriteFile(request["out"], image->rgb);
  return {{"height", image->height}, {"width", image->width}};
}

Json Resize(const Json& request) {
  const auto raw = ReadFile(request["file"]);
  const pre::Image image{
      .width = request["width"], .height = request["height"], .rgb = std::vector<uint8_t>(raw.begin(), raw.end())};
  Json sizes = Json::array();
  for (const auto& [height, width, out] : request["targets"].get<std::vector<std::tuple<int, int, std::string>>>()) {
    WriteFile(out, pre::ResizeBicubic(image, {height, width}).rgb);
  }
  return Json::object();
}

Json SmartResize(const Json& request) {
  Json out = Json::array();
  for (const auto& [frames, height, width, factor, min, max] :
       request["cases"].get<std::vector<std::tuple<int, int, int, int, int64_t, int64_t>>>()) {
    const auto size = frames == 0 ? pre::SmartResizeImage({height, width}, factor, {min, max})
                                  : pre::SmartResizeVideo(frames, {height, width}, factor, 2, {min, max});
    out.push_back(size.ok() ? Json{size->height, size->width} : Json("error"));
  }
  return {{"sizes", out}};
}

Json Sample(const Json& request) {
  Json out = Json::array();
  for (const auto& [total, fps] : request["cases"].get<std::vector<std::pair<int64_t, double>>>()) {
    out.push_back(*pre::SampleFrameIndices(total, fps, {}));
  }
  return {{"indices", out}};
}

Json VideoAnswer(const qwen::Result<pre::VideoInput>& video, const Json& request) {
  if (!video.ok()) return Error(video.status());
  WriteFile(request["out"], video->input.patches);
  return {{"grid", video->input.grid}, {"timestamps", video->timestamps}};
}

Json MakeImage(const Json& request, const pre::ProcessorConfig& config) {
  const auto file = ReadFile(request["file"]);
  const auto image = pre::DecodeImage(std::as_bytes(std::span(file)));
  if (!image.ok()) return Error(image.status());
  const auto input = pre::MakeImageInput(*image, config.image);
  if (!input.ok()) return Error(input.status());
  WriteFile(request["out"], input->patches);
  return {{"grid", input->grid}, {"hash", pre::ContentHash(*input)}};
}

Json MakeVideo(const Json& request, const pre::ProcessorConfig& config) {
  const auto file = ReadFile(request["file"]);
  const auto bytes = std::as_bytes(std::span(file));
  Json answer = VideoAnswer(pre::MakeVideoInputFromFile(bytes, config.video), request);
  if (answer.contains("error")) return answer;
  const auto sampled = pre::DecodeVideo(bytes, config.video);
  if (!sampled.ok()) return Error(sampled.status());
  std::vector<uint8_t> frames;
  for (const pre::Image& frame : sampled->frames) frames.insert(frames.end(), frame.rgb.begin(), frame.rgb.end());
  WriteFile(request["frames_out"], frames);
  answer["indices"] = sampled->indices;
  answer["fps"] = sampled->fps;
  answer["total"] = sampled->total_frames;
  answer["frame_count"] = sampled->frames.size();
  return answer;
}

Json MakeFrames(const Json& request, const pre::ProcessorConfig& config) {
  std::vector<pre::Image> frames;
  for (const std::string& path : request["files"].get<std::vector<std::string>>()) {
    const auto file = ReadFile(path);
    frames.push_back(*pre::DecodeImage(std::as_bytes(std::span(file))));
  }
  std::optional<double> fps;
  if (request.contains("fps")) fps = request["fps"].get<double>();
  return VideoAnswer(pre::MakeVideoInput(frames, fps, config.video), request);
}

Json Expand(const Json& request) {
  std::vector<pre::ImageMedia> images;
  for (const Grid& grid : request["images"].get<std::vector<Grid>>()) images.push_back({grid});
  std::vector<pre::VideoMedia> videos;
  for (const Json& video : request["videos"]) {
    videos.push_back({video["grid"].get<Grid>(), video["timestamps"].get<std::vector<double>>()});
  }
  const auto text = pre::ExpandPlaceholders(request["text"].get<std::string>(), images, videos);
  return text.ok() ? Json{{"text", *text}} : Error(text.status());
}

Json Positions(const Json& request) {
  const auto tokens = request["tokens"].get<std::vector<int32_t>>();
  const auto images = request["images"].get<std::vector<Grid>>(), videos = request["videos"].get<std::vector<Grid>>();
  const auto result = pre::ComputePositions(
      tokens, {.image_pad = request["image_pad"], .video_pad = request["video_pad"]}, images, videos);
  if (!result.ok()) return Error(result.status());
  Json axes = {Json::array(), Json::array(), Json::array()};
  for (const auto& position : result->positions) {
    axes[0].push_back(position.t);
    axes[1].push_back(position.h);
    axes[2].push_back(position.w);
  }
  return {{"positions", axes},
          {"delta", result->delta},
          {"image_runs", result->image_runs},
          {"video_runs", result->video_runs}};
}

Json Config(const pre::ProcessorConfig& config) {
  return {{"image_budget", {config.image.budget.min_pixels, config.image.budget.max_pixels}},
          {"image_patch", config.image.patch_size},
          {"image_mean", config.image.normalization.mean},
          {"image_std", config.image.normalization.std},
          {"video_budget", {config.video.budget.min_pixels, config.video.budget.max_pixels}},
          {"video_patch", config.video.patch_size},
          {"video_mean", config.video.normalization.mean},
          {"video_std", config.video.normalization.std},
          {"fps", config.video.fps},
          {"min_frames", config.video.min_frames},
          {"max_frames", config.video.max_frames}};
}

Json Answer(const Json& request) {
  const std::string op = request["op"];
  if (op == "decode") return Decode(request);
  if (op == "resize") return Resize(request);
  if (op == "smart_resize") return SmartResize(request);
  if (op == "sample") return Sample(request);
  if (op == "expand") return Expand(request);
  if (op == "positions") return Positions(request);
  const auto config = pre::LoadProcessorConfig(request["checkpoint"]);
  if (!config.ok()) return Error(config.status());
  if (op == "config") return Config(*config);
  if (op == "image") return MakeImage(request, *config);
  if (op == "video") return MakeVideo(request, *config);
  QP_CHECK_EQ(op, "frames");
  return MakeFrames(request, *config);
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << Answer(Json::parse(line)).dump() << std::endl;
  return 0;
}

#include "stage/vision/preprocess/processor_config.h"

#include <cmath>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

namespace qwen::preprocess {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxConfigBytes = 1 << 20;  // the real files have 800 bytes

// Reads typed keys of one JSON object; the first error sticks.
class Reader {
 public:
  explicit Reader(const Json& object) : object_(object) {}

  // False when the key is absent or null: the default then stays.
  template <typename T>
  bool Integer(const char* key, T min, T max, T* out) {
    const Json* value = Find(key);
    if (value == nullptr) return false;
    if (!value->is_number_integer() || value->get<double>() < static_cast<double>(min) ||
        value->get<double>() > static_cast<double>(max)) {
      Fail(key, "must be an integer from " + std::to_string(min) + " to " + std::to_string(max));
      return false;
    }
    *out = value->get<T>();
    return true;
  }
  void Boolean(const char* key, bool* out) {
    const Json* value = Find(key);
    if (value == nullptr) return;
    if (value->is_boolean()) {
      *out = value->get<bool>();
    } else {
      Fail(key, "must be true or false");
    }
  }
  bool Positive(const char* key, double* out) {
    const Json* value = Find(key);
    if (value == nullptr) return false;
    if (!value->is_number() || !(value->get<double>() > 0) || !std::isfinite(value->get<double>())) {
      Fail(key, "must be a positive number");
      return false;
    }
    *out = value->get<double>();
    return true;
  }
  // Three numbers, or one for all three.
  void Channels(const char* key, std::array<double, 3>* out) {
    const Json* value = Find(key);
    if (value == nullptr) return;
    if (value->is_number()) {
      out->fill(value->get<double>());
    } else if (value->is_array() && value->size() == 3 && (*value)[0].is_number() && (*value)[1].is_number() &&
               (*value)[2].is_number()) {
      for (size_t i = 0; i < 3; ++i) (*out)[i] = (*value)[i].get<double>();
    } else {
      Fail(key, "must be one number or three");
    }
  }
  const Json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  void Fail(const std::string& key, const std::string& why) {
    if (status_.ok()) status_ = InvalidArgumentError("\"" + key + "\" " + why);
  }
  const Status& status() const { return status_; }

 private:
  const Json& object_;
  Status status_;
};

constexpr int64_t kMaxBudget = int64_t{1} << 32;  // pixels; the released video budget is 2^24.6

void ReadBudget(Reader& reader, PixelBudget* budget) {
  if (const Json* size = reader.Find("size"); size != nullptr) {
    if (!size->is_object()) return reader.Fail("size", "must be an object with shortest_edge and longest_edge");
    Reader inner(*size);
    const bool both = inner.Integer<int64_t>("shortest_edge", 1, kMaxBudget, &budget->min_pixels) &&
                      inner.Integer<int64_t>("longest_edge", 1, kMaxBudget, &budget->max_pixels);
    if (!both) reader.Fail("size", "must have shortest_edge and longest_edge, positive integers");
  }
}

// What both processors share. `mean` and `std` come with the class defaults.
void ReadCommon(Reader& reader, std::array<double, 3> mean, std::array<double, 3> std, int32_t* patch_size,
                int32_t* temporal_patch_size, int32_t* merge_size, bool* do_resize, PixelNormalization* normalization) {
  reader.Integer<int32_t>("patch_size", 1, 256, patch_size);
  reader.Integer<int32_t>("temporal_patch_size", 1, 16, temporal_patch_size);
  reader.Integer<int32_t>("merge_size", 1, 16, merge_size);
  reader.Boolean("do_resize", do_resize);
  int32_t resample = 3;  // PIL's number for bicubic
  reader.Integer<int32_t>("resample", 0, 5, &resample);
  if (resample != 3) reader.Fail("resample", "is not supported: only 3 (bicubic) is");
  bool do_normalize = true, do_rescale = true;
  reader.Boolean("do_normalize", &do_normalize);
  reader.Boolean("do_rescale", &do_rescale);
  if (!do_normalize) reader.Fail("do_normalize", "is not supported when false");
  double rescale_factor = 1.0 / 255.0;
  reader.Positive("rescale_factor", &rescale_factor);
  reader.Channels("image_mean", &mean);
  reader.Channels("image_std", &std);
  // torch.tensor(list) is fp32 and so is its product with a Python number.
  const float factor = do_rescale ? static_cast<float>(1.0 / rescale_factor) : 1.0f;
  for (size_t c = 0; c < 3; ++c) {
    if (std[c] == 0) reader.Fail("image_std", "must not be zero");
    normalization->mean[c] = static_cast<float>(mean[c]) * factor;
    normalization->std[c] = static_cast<float>(std[c]) * factor;
  }
}

Result<ImageProcessorConfig> FromImageJson(const Json& json) {
  Reader reader(json);
  ImageProcessorConfig config;
  ReadBudget(reader, &config.budget);
  // Qwen2VLImageProcessor.__init__: the older spelling wins over `size`.
  reader.Integer<int64_t>("min_pixels", 1, kMaxBudget, &config.budget.min_pixels);
  reader.Integer<int64_t>("max_pixels", 1, kMaxBudget, &config.budget.max_pixels);
  ReadCommon(reader, {0.48145466, 0.4578275, 0.40821073}, {0.26862954, 0.26130258, 0.27577711}, &config.patch_size,
             &config.temporal_patch_size, &config.merge_size, &config.do_resize, &config.normalization);  // CLIP
  RETURN_IF_ERROR(reader.status());
  return config;
}

Result<VideoProcessorConfig> FromVideoJson(const Json& json) {
  Reader reader(json);
  VideoProcessorConfig config;
  ReadBudget(reader, &config.budget);
  ReadCommon(reader, {0.5, 0.5, 0.5}, {0.5, 0.5, 0.5}, &config.patch_size, &config.temporal_patch_size,
             &config.merge_size, &config.do_resize, &config.normalization);  // IMAGENET_STANDARD
  reader.Positive("fps", &config.fps);
  reader.Integer<int32_t>("num_frames", 1, 1 << 20, &config.num_frames);
  reader.Integer<int32_t>("min_frames", 1, 1 << 20, &config.min_frames);
  reader.Integer<int32_t>("max_frames", 1, 1 << 20, &config.max_frames);
  reader.Boolean("cap_pixels_per_frame", &config.cap_pixels_per_frame);
  reader.Integer<int32_t>("max_video_tokens", 1, 1 << 20, &config.max_video_tokens);
  bool do_sample_frames = true;
  reader.Boolean("do_sample_frames", &do_sample_frames);
  if (!do_sample_frames) reader.Fail("do_sample_frames", "is not supported when false");
  RETURN_IF_ERROR(reader.status());
  return config;
}

Result<Json> ParseObject(std::string_view text) {
  if (text.size() > kMaxConfigBytes) return InvalidArgumentError("larger than 1 MiB");
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return InvalidArgumentError("not a JSON object");
  return json;
}

// The object in `dir/name`, or nothing when there is no such file.
Result<std::optional<Json>> ReadObject(const std::string& dir, const std::string& name) {
  std::ifstream file(dir + "/" + name, std::ios::binary);
  if (!file) return std::optional<Json>();
  std::string text(kMaxConfigBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  auto json = ParseObject(text);
  if (!json.ok()) return json.status().WithContext(name);
  return std::optional<Json>(*std::move(json));
}

}  // namespace

Result<ImageProcessorConfig> ParseImageProcessorConfig(std::string_view text) {
  ASSIGN_OR_RETURN(const Json json, ParseObject(text));
  return FromImageJson(json);
}

Result<VideoProcessorConfig> ParseVideoProcessorConfig(std::string_view text) {
  ASSIGN_OR_RETURN(const Json json, ParseObject(text));
  return FromVideoJson(json);
}

Result<ProcessorConfig> LoadProcessorConfig(const std::string& dir) {
  ASSIGN_OR_RETURN(const auto joint, ReadObject(dir, "processor_config.json"));
  ASSIGN_OR_RETURN(const auto image_file, ReadObject(dir, "preprocessor_config.json"));
  ASSIGN_OR_RETURN(const auto video_file, ReadObject(dir, "video_preprocessor_config.json"));
  const auto nested = [&joint](const char* key) -> const Json* {
    if (!joint || !joint->contains(key) || !(*joint)[key].is_object()) return nullptr;
    return &(*joint)[key];
  };
  const Json* image = nested("image_processor");
  if (image == nullptr && image_file) image = &*image_file;
  const Json* video = nested("video_processor");
  if (video == nullptr && video_file) video = &*video_file;
  if (video == nullptr && image_file) video = &*image_file;
  if (image == nullptr) return NotFoundError("no preprocessor_config.json or processor_config.json");
  if (video == nullptr) return NotFoundError("no video_preprocessor_config.json or processor_config.json");
  ProcessorConfig config;
  auto image_config = FromImageJson(*image);
  if (!image_config.ok()) return image_config.status().WithContext("image processor");
  auto video_config = FromVideoJson(*video);
  if (!video_config.ok()) return video_config.status().WithContext("video processor");
  config.image = *std::move(image_config);
  config.video = *std::move(video_config);
  return config;
}

}  // namespace qwen::preprocess

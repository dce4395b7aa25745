#include "stage/contract/model_shape.h"

#include <openssl/sha.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace qwen::contract {
namespace {

using Json = nlohmann::json;

constexpr size_t kConfigBytesMax = 16 << 20;  // a real config.json is about 3 KB
constexpr int64_t kSizeMax = int64_t{1} << 24;  // any one dimension; the largest real one is the vocabulary, 151,936

// Reads typed keys of one JSON object and remembers the first thing that was wrong, so that a parser reads as a table.
class Reader {
 public:
  Reader(const Json& object, std::string path, Status& error) : object_(object), path_(std::move(path)), error_(error) {}

  bool Present(const char* key) const { return object_.contains(key); }
  bool Has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }
  const Json& Get(const char* key) const { return object_.at(key); }
  std::string PathOf(const char* key) const { return path_.empty() ? key : path_ + "." + key; }
  void Fail(const char* key, std::string_view what) const {
    if (error_.ok()) error_ = InvalidArgumentError("config.json: " + PathOf(key) + ": " + std::string(what));
  }

  // `minimum` also bounds from below what may be given. No default: the key is required.
  int32_t Int(const char* key, std::optional<int32_t> otherwise = std::nullopt, int32_t minimum = 1) const {
    if (!Has(key)) {
      if (!otherwise) Fail(key, "missing");
      return otherwise.value_or(minimum);
    }
    const Json& value = Get(key);
    if (!value.is_number_integer()) {
      Fail(key, "must be an integer, found " + value.dump().substr(0, 40));
      return minimum;
    }
    const auto number = value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(kSizeMax) ? kSizeMax + 1 : value.get<int64_t>();
    if (number < minimum || number > kSizeMax) {
      Fail(key, "must be in [" + std::to_string(minimum) + ", " + std::to_string(kSizeMax) + "], found " + value.dump());
      return minimum;
    }
    return static_cast<int32_t>(number);
  }
  double Number(const char* key, double otherwise) const {
    if (!Has(key)) return otherwise;
    if (!Get(key).is_number()) {
      Fail(key, "must be a number");
      return otherwise;
    }
    return Get(key).get<double>();
  }
  bool Bool(const char* key, bool otherwise) const {
    if (!Has(key)) return otherwise;
    if (!Get(key).is_boolean()) {
      Fail(key, "must be true or false");
      return otherwise;
    }
    return Get(key).get<bool>();
  }
  std::string Text(const char* key, const std::string& otherwise) const {
    if (!Has(key)) return otherwise;
    if (!Get(key).is_string()) {
      Fail(key, "must be a string");
      return otherwise;
    }
    return Get(key).get<std::string>();
  }
  std::vector<int32_t> Ints(const char* key, std::vector<int32_t> otherwise) const {
    if (!Has(key)) return otherwise;
    std::vector<int32_t> out;
    if (Get(key).is_array() && Get(key).size() <= 4096) {
      for (const Json& item : Get(key)) {
        if (!item.is_number_integer() || item.get<int64_t>() < 0 || item.get<int64_t>() > kSizeMax) break;
        out.push_back(item.get<int32_t>());
      }
      if (out.size() == Get(key).size()) return out;
    }
    Fail(key, "must be an array of integers >= 0");
    return otherwise;
  }
  // Vision sizes may be written as one number or once per axis (transformers: int | list[int]); all axes must agree.
  int32_t SquareInt(const char* key, int32_t otherwise) const {
    if (!Has(key) || !Get(key).is_array()) return Int(key, otherwise);
    const std::vector<int32_t> axes = Ints(key, {otherwise});
    if (axes.empty() || axes[0] < 1 || std::any_of(axes.begin(), axes.end(), [&](int32_t a) { return a != axes[0]; })) {
      Fail(key, "must be one size, or the same size on every axis");
      return otherwise;
    }
    return axes[0];
  }
  // An object to descend into; an empty one when absent.
  Reader Object(const char* key) const {
    static const Json empty = Json::object();
    if (!Has(key)) return Reader(empty, PathOf(key), error_);
    if (!Get(key).is_object()) {
      Fail(key, "must be an object");
      return Reader(empty, PathOf(key), error_);
    }
    return Reader(Get(key), PathOf(key), error_);
  }

 private:
  const Json& object_;
  std::string path_;
  Status& error_;
};

Dtype ParseDtype(const Reader& top, const Reader& text) {
  // Newer files say dtype, older ones torch_dtype; when both are there transformers keeps dtype. VL files of the hub have
  // it in text_config only.
  for (const Reader* reader : {&top, &text}) {
    for (const char* key : {"dtype", "torch_dtype"}) {
      const std::string name = reader->Text(key, "");
      if (name.empty()) continue;
      if (name == "bfloat16") return Dtype::kBFloat16;
      if (name == "float32") return Dtype::kFloat32;
      reader->Fail(key, "must be bfloat16 or float32, found \"" + name + "\"");
      return Dtype::kBFloat16;
    }
  }
  return Dtype::kBFloat16;  // what every released checkpoint is in
}

void ParseRope(const Reader& text, bool vision_language, ModelShape& shape) {
  // transformers 5.17 (RotaryEmbeddingConfigMixin): rope_scaling, when it is there and not empty, replaces
  // rope_parameters; rope_theta inside wins over the one beside; else the class default.
  const bool old_form = text.Has("rope_scaling") && text.Get("rope_scaling").is_object() && !text.Get("rope_scaling").empty();
  const Reader rope = text.Object(old_form ? "rope_scaling" : "rope_parameters");
  shape.rope_theta = rope.Number("rope_theta", text.Number("rope_theta", vision_language ? 500000.0 : 10000.0));
  if (!(shape.rope_theta > 1.0) || !std::isfinite(shape.rope_theta)) text.Fail("rope_theta", "must be a number > 1");
  shape.rope_type = rope.Text("rope_type", rope.Text("type", "default"));
  if (shape.rope_type == "mrope") shape.rope_type = "default";  // transformers 4.x wrote type "mrope" for the same thing
  if (shape.rope_type == "yarn") {
    shape.rope_factor = rope.Number("factor", 0.0);
    if (!(shape.rope_factor >= 1.0) || !std::isfinite(shape.rope_factor)) rope.Fail("factor", "must be a number >= 1 for yarn");
    shape.rope_original_max_positions = rope.Int("original_max_position_embeddings", shape.max_positions);
    shape.rope_attention_factor = rope.Number("attention_factor", 0.0);
    shape.rope_beta_fast = rope.Number("beta_fast", 32.0);
    shape.rope_beta_slow = rope.Number("beta_slow", 1.0);
    for (const char* key : {"mscale", "mscale_all_dim"})
      if (rope.Has(key)) rope.Fail(key, "is not supported: no Qwen3 model uses it");
    if (!rope.Bool("truncate", true)) rope.Fail("truncate", "false is not supported: no Qwen3 model uses it");
  } else if (shape.rope_type != "default") {
    rope.Fail("rope_type", "must be default or yarn, found \"" + shape.rope_type + "\"");
  }
  if (!vision_language) return;

  // Interleaved MRoPE: of `half` frequencies, H takes slice(1, 3*section[1], 3) and W slice(2, 3*section[2], 3), T the
  // rest. Slices are cut off at `half`, so a section that is too long for a small head is well defined: what is stored here
  // is how many frequencies each axis really gets.
  const std::vector<int32_t> section = rope.Ints("mrope_section", {24, 20, 20});
  if (section.size() != 3) {
    rope.Fail("mrope_section", "must have three numbers (t, h, w)");
    return;
  }
  const int32_t half = shape.head_dim / 2;
  const auto taken = [&](int32_t start, int32_t stop) { return std::max(0, (std::min(stop, half) - start + 2) / 3); };
  const int32_t h = taken(1, 3 * section[1]), w = taken(2, 3 * section[2]);
  shape.mrope_section = {half - h - w, h, w};
}

void ParseMoe(const Reader& text, bool vision_language, ModelShape& shape) {
  MoeShape moe;
  // transformers 5 writes num_local_experts, the hub's files num_experts: the same attribute.
  moe.experts = text.Int(text.Has("num_experts") ? "num_experts" : "num_local_experts", vision_language ? 60 : 128);
  moe.experts_per_token = text.Int("num_experts_per_tok", vision_language ? 4 : 8);
  moe.intermediate = text.Int("moe_intermediate_size", vision_language ? 1408 : 768);
  moe.norm_topk_prob = vision_language || text.Bool("norm_topk_prob", false);  // the VL router always divides
  moe.decoder_sparse_step = text.Int("decoder_sparse_step", 1);
  moe.mlp_only_layers = text.Ints("mlp_only_layers", {});
  std::sort(moe.mlp_only_layers.begin(), moe.mlp_only_layers.end());
  if (moe.experts_per_token > moe.experts) text.Fail("num_experts_per_tok", "is more than num_experts");
  shape.moe = std::move(moe);
}

void ParseVision(const Reader& vision, ModelShape& shape) {
  VisionShape v;
  v.depth = vision.Int("depth", 27);
  v.hidden = vision.Int("hidden_size", 1152);
  v.heads = vision.Int(vision.Has("num_heads") ? "num_heads" : "num_attention_heads", 16);
  v.intermediate = vision.Int("intermediate_size", 4304);
  v.in_channels = vision.Int("in_channels", 3);
  v.patch = vision.SquareInt("patch_size", 16);
  v.temporal_patch = vision.SquareInt("temporal_patch_size", 2);
  v.merge = vision.Int("spatial_merge_size", 2);
  v.out_hidden = vision.Int("out_hidden_size", 3584);
  v.position_table = vision.Int("num_position_embeddings", 2304);
  v.deepstack_layers = vision.Ints("deepstack_visual_indexes", {8, 16, 24});
  v.hidden_act = vision.Text("hidden_act", "gelu_pytorch_tanh");

  const int32_t side = static_cast<int32_t>(std::lround(std::sqrt(static_cast<double>(v.position_table))));
  if (side * side != v.position_table) vision.Fail("num_position_embeddings", "must be a square");
  if (v.hidden % v.heads != 0) vision.Fail("num_heads", "does not divide hidden_size");
  else if (v.head_dim() % 4 != 0) vision.Fail("hidden_size", "hidden_size / num_heads must be a multiple of 4 (2-D rotary halves)");
  if (v.out_hidden != shape.hidden)
    vision.Fail("out_hidden_size", "is " + std::to_string(v.out_hidden) + ", but text_config.hidden_size is " + std::to_string(shape.hidden));
  if (v.hidden_act != "gelu_pytorch_tanh" && v.hidden_act != "gelu") vision.Fail("hidden_act", "must be gelu_pytorch_tanh or gelu");
  for (size_t i = 0; i < v.deepstack_layers.size(); ++i) {
    if (v.deepstack_layers[i] >= v.depth) vision.Fail("deepstack_visual_indexes", "names a block that is not there");
    if (i > 0 && v.deepstack_layers[i] <= v.deepstack_layers[i - 1]) vision.Fail("deepstack_visual_indexes", "must ascend");
  }
  if (static_cast<int32_t>(v.deepstack_layers.size()) > shape.layers)
    vision.Fail("deepstack_visual_indexes", "has more taps than there are text layers");
  shape.vision = std::move(v);
}

void ParseQuantization(const Reader& quantization, ModelShape& shape) {
  const std::string method = quantization.Text("quant_method", "");
  if (method != "fp8") {
    quantization.Fail("quant_method", "must be fp8 (block-wise), found \"" + method + "\"");
    return;
  }
  const std::string format = quantization.Text("fmt", "e4m3");
  if (format != "e4m3") quantization.Fail("fmt", "must be e4m3, found \"" + format + "\"");
  const std::string scheme = quantization.Text("activation_scheme", "dynamic");
  if (scheme != "dynamic") quantization.Fail("activation_scheme", "must be dynamic, found \"" + scheme + "\"");
  QuantizationShape q;
  const std::vector<int32_t> block = quantization.Ints("weight_block_size", {128, 128});
  if (block.size() != 2 || block[0] < 1 || block[1] < 1) quantization.Fail("weight_block_size", "must be two numbers >= 1");
  else q.block_rows = block[0], q.block_columns = block[1];
  for (const char* key : {"modules_to_not_convert", "ignored_layers"}) {
    if (!quantization.Has(key)) continue;
    const Json& list = quantization.Get(key);
    if (!list.is_array() || list.size() > 100000 || !std::all_of(list.begin(), list.end(), [](const Json& j) { return j.is_string(); })) {
      quantization.Fail(key, "must be an array of strings");
      continue;
    }
    for (const Json& name : list) q.not_converted.push_back(name.get<std::string>());
    break;
  }
  shape.quantization = std::move(q);
}

// The class defaults of transformers 5.17.0 stand for keys that are absent, except for the four sizes without which a file
// is not a config of any model; the families differ in their defaults.
void ParseText(const Reader& text, bool vision_language, bool moe, ModelShape& shape) {
  shape.layers = text.Int("num_hidden_layers");
  shape.hidden = text.Int("hidden_size");
  shape.heads = text.Int("num_attention_heads");
  shape.vocab = text.Int("vocab_size", 151936);
  // Null means "as many as heads" (transformers' __post_init__); the class defaults for an absent key differ by family.
  const bool kv_absent = !text.Present("num_key_value_heads");
  const int32_t kv_default = vision_language ? (moe ? 16 : 32) : (moe ? 4 : 32);
  shape.kv_heads = text.Int("num_key_value_heads", kv_absent ? kv_default : shape.heads);
  // The MoE classes derive head_dim when it is absent, the dense ones default to 128.
  shape.head_dim = text.Int("head_dim", moe ? std::max(1, shape.hidden / std::max(1, shape.heads)) : 128);
  shape.intermediate = text.Int("intermediate_size", vision_language ? (moe ? 5632 : 22016) : (moe ? 6144 : 22016));
  shape.max_positions = text.Int("max_position_embeddings", vision_language ? 128000 : 32768);
  shape.rms_eps = static_cast<float>(text.Number("rms_norm_eps", 1e-6));
  shape.attention_bias = text.Bool("attention_bias", false);

  if (shape.heads % shape.kv_heads != 0) text.Fail("num_key_value_heads", "does not divide num_attention_heads");
  if (shape.head_dim % 2 != 0) text.Fail("head_dim", "must be even (rotary halves)");
  if (!(shape.rms_eps > 0.0f)) text.Fail("rms_norm_eps", "must be > 0");
  if (text.Text("hidden_act", "silu") != "silu") text.Fail("hidden_act", "must be silu");
  if (text.Bool("use_sliding_window", false)) text.Fail("use_sliding_window", "sliding windows are not supported");
  if (text.Has("layer_types")) {
    const Json& types = text.Get("layer_types");
    if (!types.is_array() || !std::all_of(types.begin(), types.end(), [](const Json& t) { return t == "full_attention"; }))
      text.Fail("layer_types", "must all be full_attention");
  }
}

struct NamedModel {
  const char* name;
  bool moe;
  int32_t layers, hidden, heads, kv_heads, intermediate;
  bool tied;
  int32_t vision_depth, vision_hidden, vision_intermediate;
};
// The released config.json files; vision heads are 16 everywhere. MoE: 128 experts, top-8.
constexpr NamedModel kNamedModels[] = {
    {"Qwen3-VL-235B-A22B", true, 94, 4096, 64, 4, 12288, false, 27, 1152, 4304},
    {"Qwen3-VL-30B-A3B", true, 48, 2048, 32, 4, 6144, false, 27, 1152, 4304},
    {"Qwen3-VL-2B", false, 28, 2048, 16, 8, 6144, true, 24, 1024, 4096},
    {"Qwen3-VL-4B", false, 36, 2560, 32, 8, 9728, true, 24, 1024, 4096},
    {"Qwen3-VL-8B", false, 36, 4096, 32, 8, 12288, false, 27, 1152, 4304},
    {"Qwen3-VL-32B", false, 64, 5120, 64, 8, 25600, false, 27, 1152, 4304},
};

bool StripSuffix(std::string_view& text, std::string_view suffix) {
  if (!text.ends_with(suffix)) return false;
  text.remove_suffix(suffix.size());
  return true;
}

}  // namespace

int64_t DtypeBytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return 4;
    case Dtype::kBFloat16: return 2;
    case Dtype::kFloat8E4M3: return 1;
  }
  QP_CHECK(false) << "dtype " << static_cast<int>(dtype);
  return 0;
}

std::string_view DtypeName(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kBFloat16: return "bfloat16";
    case Dtype::kFloat8E4M3: return "float8_e4m3fn";
  }
  return "unknown";
}

bool ModelShape::IsMoeLayer(int32_t layer) const {
  if (!moe) return false;
  const bool dense = std::binary_search(moe->mlp_only_layers.begin(), moe->mlp_only_layers.end(), layer);
  return !dense && (layer + 1) % moe->decoder_sparse_step == 0;
}

Result<ModelShape> ParseModelShape(std::string_view config_json) {
  if (config_json.size() > kConfigBytesMax) return InvalidArgumentError("config.json: larger than 16 MiB");
  const Json json = Json::parse(config_json, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded() || !json.is_object()) return InvalidArgumentError("config.json: not a JSON object");

  Status error;
  ModelShape shape;
  const Reader top(json, "", error);
  shape.model_type = top.Text("model_type", "");
  const bool vision_language = shape.model_type == "qwen3_vl" || shape.model_type == "qwen3_vl_moe";
  const bool moe = shape.model_type == "qwen3_vl_moe" || shape.model_type == "qwen3_moe";
  if (!vision_language && !moe && shape.model_type != "qwen3")
    top.Fail("model_type", "must be qwen3_vl_moe, qwen3_vl, qwen3_moe or qwen3, found \"" + shape.model_type.substr(0, 40) + "\"");
  if (vision_language)
    for (const char* key : {"text_config", "vision_config"})
      if (!top.Has(key)) top.Fail(key, "missing");
  if (!error.ok()) return error;

  const Reader text = vision_language ? top.Object("text_config") : top;
  shape.dtype = ParseDtype(top, text);
  ParseText(text, vision_language, moe, shape);
  if (!error.ok()) return error;  // what follows divides by the sizes above
  ParseRope(text, vision_language, shape);
  if (moe) ParseMoe(text, vision_language, shape);
  // VL: only the top level counts; text_config may say true (its class default) for an untied model.
  shape.tie_embeddings = top.Bool("tie_word_embeddings", false);
  if (vision_language) {
    ParseVision(top.Object("vision_config"), shape);
    shape.image_token = top.Int("image_token_id", 151655, 0);
    shape.video_token = top.Int("video_token_id", 151656, 0);
    shape.vision_start_token = top.Int("vision_start_token_id", 151652, 0);
    shape.vision_end_token = top.Int("vision_end_token_id", 151653, 0);
    for (const auto& [key, id] : {std::pair{"image_token_id", shape.image_token}, {"video_token_id", shape.video_token},
                                  {"vision_start_token_id", shape.vision_start_token}, {"vision_end_token_id", shape.vision_end_token}})
      if (id >= shape.vocab) top.Fail(key, "is not below text_config.vocab_size");
  }
  for (const Reader* reader : {&top, &text}) {
    if (!reader->Has("quantization_config")) continue;
    ParseQuantization(reader->Object("quantization_config"), shape);
    break;
  }
  if (!error.ok()) return error;
  return shape;
}

Result<ModelShape> LoadModelShape(const std::string& checkpoint_dir) {
  for (const char* name : {"config.json", "hf_config.json"}) {
    std::ifstream file(checkpoint_dir + "/" + name, std::ios::binary);
    if (!file) continue;
    std::string text(kConfigBytesMax + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (file.bad()) return InternalError(checkpoint_dir + "/" + name + ": cannot be read");
    text.resize(static_cast<size_t>(file.gcount()));
    auto shape = ParseModelShape(text);
    if (!shape.ok()) return shape.status().WithContext(checkpoint_dir);
    return shape;
  }
  return NotFoundError(checkpoint_dir + ": holds neither config.json nor hf_config.json");
}

Result<ModelShape> NamedModelShape(std::string_view name) {
  std::string_view base = name;
  if (base.starts_with("Qwen/")) base.remove_prefix(5);
  const bool fp8 = StripSuffix(base, "-FP8");
  if (!StripSuffix(base, "-Instruct")) StripSuffix(base, "-Thinking");
  std::string known;
  for (const NamedModel& model : kNamedModels) {
    known += (known.empty() ? "" : ", ") + std::string(model.name);
    if (base != model.name) continue;
    ModelShape shape;
    shape.model_type = model.moe ? "qwen3_vl_moe" : "qwen3_vl";
    shape.layers = model.layers;
    shape.hidden = model.hidden;
    shape.heads = model.heads;
    shape.kv_heads = model.kv_heads;
    shape.head_dim = 128;
    shape.intermediate = model.intermediate;
    shape.vocab = 151936;
    shape.mrope_section = {24, 20, 20};
    shape.max_positions = 262144;
    shape.tie_embeddings = model.tied;
    if (model.moe) shape.moe = MoeShape{.experts = 128, .experts_per_token = 8, .intermediate = model.layers == 94 ? 1536 : 768};
    VisionShape vision;
    vision.depth = model.vision_depth;
    vision.hidden = model.vision_hidden;
    vision.heads = 16;
    vision.intermediate = model.vision_intermediate;
    vision.out_hidden = model.hidden;
    vision.position_table = 2304;
    vision.deepstack_layers = model.vision_depth == 27 ? std::vector<int32_t>{8, 16, 24} : std::vector<int32_t>{5, 11, 17};
    shape.vision = vision;
    if (fp8) shape.quantization = QuantizationShape{};
    shape.image_token = 151655;
    shape.video_token = 151656;
    shape.vision_start_token = 151652;
    shape.vision_end_token = 151653;
    return shape;
  }
  return NotFoundError("no model named \"" + std::string(name) + "\"; there are " + known + ", with -Instruct or -Thinking, and -FP8");
}

std::string ConfigHash(const ModelShape& s) {
  // A fixed order of fields, each with its name: two shapes hash alike iff every field is alike.
  std::ostringstream text;
  text.precision(17);
  const auto list = [&](const auto& values) {
    for (const auto& value : values) text << value << ',';
  };
  text << "v1;" << s.model_type << ";dtype=" << DtypeName(s.dtype) << ";layers=" << s.layers << ";hidden=" << s.hidden << ";heads=" << s.heads
       << ";kv_heads=" << s.kv_heads << ";head_dim=" << s.head_dim << ";intermediate=" << s.intermediate << ";vocab=" << s.vocab
       << ";eps=" << s.rms_eps << ";theta=" << s.rope_theta << ";mrope=";
  list(s.mrope_section);
  text << ";rope=" << s.rope_type << ',' << s.rope_factor << ',' << s.rope_original_max_positions << ',' << s.rope_attention_factor << ','
       << s.rope_beta_fast << ',' << s.rope_beta_slow << ";positions=" << s.max_positions << ";tied=" << s.tie_embeddings
       << ";bias=" << s.attention_bias << ";tokens=" << s.image_token << ',' << s.video_token << ',' << s.vision_start_token << ','
       << s.vision_end_token;
  if (s.moe) {
    text << ";moe=" << s.moe->experts << ',' << s.moe->experts_per_token << ',' << s.moe->intermediate << ',' << s.moe->norm_topk_prob << ','
         << s.moe->decoder_sparse_step << ':';
    list(s.moe->mlp_only_layers);
  }
  if (s.vision) {
    const VisionShape& v = *s.vision;
    text << ";vision=" << v.depth << ',' << v.hidden << ',' << v.heads << ',' << v.intermediate << ',' << v.in_channels << ',' << v.patch << ','
         << v.temporal_patch << ',' << v.merge << ',' << v.out_hidden << ',' << v.position_table << ',' << v.hidden_act << ':';
    list(v.deepstack_layers);
  }
  if (s.quantization) {
    text << ";fp8=" << s.quantization->block_rows << ',' << s.quantization->block_columns << ':';
    list(s.quantization->not_converted);
  }
  const std::string bytes = text.str();
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  for (unsigned char byte : digest) {
    hex += kHex[byte >> 4];
    hex += kHex[byte & 15];
  }
  return hex;
}

}  // namespace qwen::contract

#include "stage/weights/checkpoint.h"

#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

namespace qwen::weights {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

// The 235B's index is 3 MB with fused experts; with one key per expert, a 94-layer model has 36,000 keys in about 5 MB.
constexpr int64_t kJsonBytesMax = 256 << 20;
constexpr size_t kReportedLinesMax = 8;

Result<Json> ReadJson(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) return NotFoundError(path + ": cannot be opened");
  const int64_t size = file.tellg();
  if (size < 0 || size > kJsonBytesMax) return DataLossError(path + ": larger than 256 MiB");
  std::string text(static_cast<size_t>(size), '\0');
  file.seekg(0);
  if (!file.read(text.data(), size)) return DataLossError(path + ": cannot be read");
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded() || !json.is_object()) return DataLossError(path + ": not a JSON object");
  return json;
}

// A file name out of an index must stay inside the checkpoint's folder.
bool IsPlainFileName(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name[0] != '.' && name.find('/') == std::string::npos && name.find('\0') == std::string::npos &&
         name.ends_with(".safetensors");
}

// Manifests may spell dtypes as the format does or as torch does.
std::string CanonicalDtype(std::string name) {
  if (name.starts_with("torch.")) name.erase(0, 6);
  static const std::map<std::string, std::string> torch_names = {{"float32", "F32"}, {"bfloat16", "BF16"}, {"float16", "F16"}, {"float8_e4m3fn", "F8_E4M3"}};
  const auto found = torch_names.find(name);
  return found == torch_names.end() ? name : found->second;
}

std::vector<int64_t> SwapLastTwo(std::vector<int64_t> shape) {
  std::swap(shape[shape.size() - 1], shape[shape.size() - 2]);
  return shape;
}

std::string Mismatch(const std::string& key, std::string_view expected, std::string_view found, const std::string& file) {
  return "tensor " + key + ": expected " + std::string(expected) + ", found " + std::string(found) + " in " + file;
}

std::string StageFolder(int32_t index, int32_t stages) {
  char name[40];
  std::snprintf(name, sizeof(name), "stage-%02d-of-%02d", index, stages);
  return name;
}

}  // namespace

Status Report::ToStatus() const {
  if (ok()) return OkStatus();
  std::string text;
  size_t shown = 0;
  const size_t total = missing.size() + mismatched.size() + unexpected.size();
  for (const auto* lines : {&mismatched, &missing, &unexpected}) {
    for (const std::string& line : *lines) {
      if (shown == kReportedLinesMax) continue;
      text += (shown++ ? "; " : "") + line;
    }
  }
  if (total > shown) text += "; and " + std::to_string(total - shown) + " more";
  return DataLossError("checkpoint does not fit its config: " + text);
}

const Entry* StageTensors::Find(std::string_view slot) const {
  const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.slot == slot; });
  return found == entries.end() ? nullptr : &*found;
}

Result<Checkpoint> Checkpoint::Open(const std::string& dir) {
  Checkpoint checkpoint(dir);
  const std::string index_path = dir + "/model.safetensors.index.json";
  std::error_code ignored;
  if (fs::exists(index_path, ignored)) {
    ASSIGN_OR_RETURN(const Json index, ReadJson(index_path));
    if (!index.contains("weight_map") || !index["weight_map"].is_object()) return DataLossError(index_path + ": weight_map: missing");
    for (const auto& [key, file] : index["weight_map"].items()) {
      if (!file.is_string() || !IsPlainFileName(file.get<std::string>()))
        return DataLossError(index_path + ": weight_map." + key.substr(0, 200) + ": must be the name of a .safetensors file in the same folder");
      checkpoint.key_to_file_.emplace(key, file.get<std::string>());
    }
  } else if (fs::exists(dir + "/model.safetensors", ignored)) {
    ASSIGN_OR_RETURN(const SafetensorsFile* file, checkpoint.File("model.safetensors"));
    for (const auto& [key, tensor] : file->header().tensors) checkpoint.key_to_file_.emplace(key, "model.safetensors");
  } else {
    return NotFoundError(dir + ": holds neither model.safetensors nor model.safetensors.index.json");
  }
  if (fs::exists(dir + "/weights_manifest.json", ignored)) RETURN_IF_ERROR(checkpoint.ReadManifest());
  return checkpoint;
}

Result<Checkpoint> Checkpoint::OpenStage(const std::string& dir, int32_t index, int32_t stages) {
  const std::string folder = dir + "/" + StageFolder(index, stages);
  std::error_code ignored;
  if (fs::is_directory(folder, ignored)) return Open(folder);
  // An export for another number of stages must not be mistaken for an empty checkpoint.
  if (!fs::exists(dir + "/model.safetensors", ignored) && !fs::exists(dir + "/model.safetensors.index.json", ignored)) {
    for (const auto& item : fs::directory_iterator(dir, ignored))
      if (item.path().filename().string().starts_with("stage-"))
        return NotFoundError(dir + ": exported as " + item.path().filename().string() + ", but " + StageFolder(index, stages) + " is asked for");
  }
  return Open(dir);
}

Status Checkpoint::ReadManifest() {
  const std::string path = dir_ + "/weights_manifest.json";
  ASSIGN_OR_RETURN(const Json manifest, ReadJson(path));
  const Json& tensors = manifest.contains("tensors") && manifest["tensors"].is_object() ? manifest["tensors"] : manifest;
  for (const auto& item : tensors.items()) {  // not a structured binding: clang 14 cannot capture those
    const std::string& key = item.key();
    const Json& value = item.value();
    const auto fail = [&](const char* what) { return DataLossError(path + ": " + key.substr(0, 200) + ": " + what); };
    if (!value.is_object()) return fail("must be an object");
    ManifestTensor tensor;
    if (!value.contains("dtype") || !value["dtype"].is_string()) return fail("dtype: missing");
    tensor.dtype = CanonicalDtype(value["dtype"].get<std::string>());
    if (!value.contains("bytes") || !value["bytes"].is_number_unsigned()) return fail("bytes: missing");
    tensor.bytes = value["bytes"].get<int64_t>();
    if (!value.contains("shape") || !value["shape"].is_array()) return fail("shape: missing");
    for (const Json& size : value["shape"]) {
      if (!size.is_number_unsigned()) return fail("shape: must hold integers >= 0");
      tensor.shape.push_back(size.get<int64_t>());
    }
    if (!value.contains("sha256") || !value["sha256"].is_string() || value["sha256"].get<std::string>().size() != 64) return fail("sha256: must be 64 hex digits");
    tensor.sha256 = value["sha256"].get<std::string>();
    manifest_.emplace(key, std::move(tensor));
  }
  for (const auto& [key, tensor] : manifest_)
    if (!Has(key)) return DataLossError(path + ": " + key + ": is in the manifest, but in no file");
  for (const auto& [key, file] : key_to_file_)
    if (!manifest_.count(key)) return DataLossError(path + ": " + key + ": is in " + file + ", but not in the manifest");
  return OkStatus();
}

Result<const SafetensorsFile*> Checkpoint::File(const std::string& name) {
  auto& slot = files_[name];
  if (!slot) {
    auto file = SafetensorsFile::Open(dir_ + "/" + name);
    if (!file.ok()) return file.status();
    slot = std::move(*file);
  }
  return slot.get();
}

Result<TensorInfo> Checkpoint::Info(const std::string& key) {
  const std::string& name = key_to_file_.at(key);
  ASSIGN_OR_RETURN(const SafetensorsFile* file, File(name));
  const auto found = file->header().tensors.find(key);
  if (found == file->header().tensors.end()) return DataLossError(dir_ + ": the index places tensor " + key + " in " + name + ", where it is not");
  if (const auto promised = manifest_.find(key); promised != manifest_.end()) {
    const TensorInfo& tensor = found->second;
    if (promised->second.shape != tensor.shape || promised->second.bytes != tensor.bytes || promised->second.dtype != StoredDtypeName(tensor.dtype))
      return DataLossError(dir_ + "/" + name + ": tensor " + key + ": the manifest says " + promised->second.dtype + " " +
                           ShapeToString(promised->second.shape) + ", the file " + std::string(StoredDtypeName(tensor.dtype)) + " " +
                           ShapeToString(tensor.shape));
  }
  return found->second;
}

const Source* Checkpoint::Choose(const Slot& slot) const {
  for (const Source& source : slot.sources)
    if (Has(source.keys[0])) return &source;
  // A per-expert export that lost its first expert is still one: the message should name that expert.
  for (const Source& source : slot.sources)
    if (std::any_of(source.keys.begin(), source.keys.end(), [&](const std::string& key) { return Has(key); })) return &source;
  return nullptr;
}

Status Checkpoint::Resolve(const contract::ModelShape& shape, const Slot& slot, StageTensors& out) {
  Report& report = out.report;
  const Source* source = Choose(slot);
  if (source == nullptr) {
    report.missing.push_back("tensor " + slot.sources[0].keys[0] + ": missing, expected " + ShapeToString(slot.shape));
    return OkStatus();
  }
  Entry entry{.slot = slot.name, .shape = slot.shape, .stored_shape = slot.shape};
  std::vector<int64_t> piece_shape = slot.shape;
  if (source->layout == Layout::kPerExpert) {
    const int64_t parts = static_cast<int64_t>(source->keys.size()) / slot.shape[0];
    piece_shape = {slot.shape[1] / parts, slot.shape[2]};
  }
  bool fits = true;
  for (size_t i = 0; i < source->keys.size(); ++i) {
    const std::string& key = source->keys[i];
    if (!Has(key)) {
      report.missing.push_back("tensor " + key + ": missing, expected " + ShapeToString(piece_shape));
      fits = false;
      continue;
    }
    ASSIGN_OR_RETURN(const TensorInfo info, Info(key));
    const std::string& file = key_to_file_.at(key);
    // transformers' own rule (core_model_loading.Transpose with check_dims): equal to the shape in memory means "as it is",
    // so where both readings have the same shape (2I == H, or I == H) the tensor is not transposed.
    if (source->layout == Layout::kFused && info.shape != slot.shape && info.shape == SwapLastTwo(slot.shape)) {
      entry.transform = Transform::kTransposeLastTwo;
      entry.stored_shape = info.shape;
    } else if (info.shape != piece_shape) {
      std::string expected = ShapeToString(piece_shape);
      if (source->layout == Layout::kFused) expected += " or " + ShapeToString(SwapLastTwo(piece_shape));
      report.mismatched.push_back(Mismatch(key, expected, ShapeToString(info.shape), file));
      fits = false;
      continue;
    }
    const bool fp8 = info.dtype == StoredDtype::kFloat8E4M3 && slot.quantizable && shape.quantization;
    if (!fp8 && info.dtype != StoredDtype::kBFloat16 && info.dtype != StoredDtype::kFloat32) {
      const char* expected = slot.quantizable && shape.quantization ? "F8_E4M3, BF16 or F32" : "BF16 or F32";
      report.mismatched.push_back(Mismatch(key, expected, StoredDtypeName(info.dtype), file));
      fits = false;
      continue;
    }
    if (entry.pieces.empty()) {
      entry.dtype = info.dtype;
    } else if (info.dtype != entry.dtype) {
      report.mismatched.push_back(Mismatch(key, std::string(StoredDtypeName(entry.dtype)) + " as " + source->keys[0], StoredDtypeName(info.dtype), file));
      fits = false;
      continue;
    }
    entry.bytes += info.bytes;
    entry.pieces.push_back({key, file, info.offset, info.bytes});
  }
  if (!fits) return OkStatus();
  const bool fp8 = entry.dtype == StoredDtype::kFloat8E4M3;
  const Transform transform = entry.transform;
  report.loaded.push_back(entry.slot);
  report.bytes += entry.bytes;
  out.entries.push_back(std::move(entry));
  return fp8 ? ResolveScale(shape, slot, *source, transform, out) : OkStatus();
}

Status Checkpoint::ResolveScale(const contract::ModelShape& shape, const Slot& slot, const Source& source, Transform transform, StageTensors& out) {
  const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const int64_t rows = shape.quantization->block_rows, columns = shape.quantization->block_columns;
  Report& report = out.report;
  Entry entry{.slot = slot.name + "_scale_inv", .shape = slot.shape, .transform = transform};
  const size_t rank = slot.shape.size();
  entry.shape[rank - 2] = blocks(slot.shape[rank - 2], rows);
  entry.shape[rank - 1] = blocks(slot.shape[rank - 1], columns);
  // Transposed weights carry transposed scales.
  entry.stored_shape = transform == Transform::kNone ? entry.shape : SwapLastTwo(entry.shape);
  std::vector<int64_t> piece_shape = entry.stored_shape;
  if (source.layout == Layout::kPerExpert) {
    const int64_t parts = static_cast<int64_t>(source.keys.size()) / slot.shape[0], part_rows = slot.shape[1] / parts;
    if (parts > 1 && part_rows % rows != 0) {  // the blocks of gate and up would not line up with those of the fused matrix
      report.mismatched.push_back("tensor " + source.keys[0] + ": expected a multiple of " + std::to_string(rows) + " rows for FP8 blocks, found " +
                                  std::to_string(part_rows));
      return OkStatus();
    }
    piece_shape = {blocks(part_rows, rows), entry.shape[2]};
  }
  for (const std::string& key : source.keys) {
    const std::string scale = Has(key + "_scale_inv") ? key + "_scale_inv" : key + "_scale";
    if (!Has(scale)) {
      report.missing.push_back("tensor " + key + "_scale_inv: missing, expected " + ShapeToString(piece_shape));
      return OkStatus();
    }
    ASSIGN_OR_RETURN(const TensorInfo info, Info(scale));
    const std::string& file = key_to_file_.at(scale);
    if (info.shape != piece_shape) {
      report.mismatched.push_back(Mismatch(scale, ShapeToString(piece_shape), ShapeToString(info.shape), file));
      return OkStatus();
    }
    const bool first = entry.pieces.empty();
    if ((info.dtype != StoredDtype::kBFloat16 && info.dtype != StoredDtype::kFloat32) || (!first && info.dtype != entry.dtype)) {
      report.mismatched.push_back(Mismatch(scale, first ? "BF16 or F32" : StoredDtypeName(entry.dtype), StoredDtypeName(info.dtype), file));
      return OkStatus();
    }
    entry.dtype = info.dtype;
    entry.bytes += info.bytes;
    entry.pieces.push_back({scale, file, info.offset, info.bytes});
  }
  report.loaded.push_back(entry.slot);
  report.bytes += entry.bytes;
  out.entries.push_back(std::move(entry));
  return OkStatus();
}

void Checkpoint::FindUnexpected(const contract::ModelShape& shape, Report& report) const {
  std::set<std::string_view> known;
  const std::vector<Slot> slots = StageSlots(shape, {.layers = {0, shape.layers}, .index = 0, .stages = 1});
  for (const Slot& slot : slots) {
    if (const Source* source = Choose(slot)) known.insert(source->keys.begin(), source->keys.end());
  }
  for (const auto& [key, file] : key_to_file_) {
    if (known.count(key) || IsIgnorableKey(key)) continue;
    std::string_view weight = key;
    for (const std::string_view suffix : {"_scale_inv", "_scale"})
      if (weight.ends_with(suffix)) weight.remove_suffix(suffix.size());
    if (shape.quantization && weight.size() < key.size() && known.count(weight)) continue;
    report.unexpected.push_back("tensor " + key.substr(0, 200) + ": not part of this " + shape.model_type + " of " + std::to_string(shape.layers) +
                                " layers, found in " + file);
  }
}

Result<StageTensors> Checkpoint::ResolveStage(const contract::ModelShape& shape, const StageSpec& spec) {
  StageTensors out;
  for (const Slot& slot : StageSlots(shape, spec)) {
    // A lone stage with a tied head keeps one matrix, unless the file holds a head of its own (transformers then loads both).
    if (slot.name == "lm_head.weight" && shape.tie_embeddings && spec.first()) {
      const Source* source = Choose(slot);
      const Entry* embedding = out.Find("embed_tokens.weight");
      if (source != nullptr && embedding != nullptr && embedding->pieces[0].key == source->keys[0]) {
        out.entries.push_back({.slot = slot.name, .shape = slot.shape, .stored_shape = slot.shape, .dtype = embedding->dtype, .alias_of = embedding->slot});
        out.report.loaded.push_back(slot.name);
        continue;
      }
    }
    RETURN_IF_ERROR(Resolve(shape, slot, out));
  }
  FindUnexpected(shape, out.report);
  return out;
}

const SafetensorsFile& Checkpoint::file(const std::string& name) const {
  const auto found = files_.find(name);
  QP_CHECK(found != files_.end() && found->second) << name;  // entries come from this checkpoint's ResolveStage
  return *found->second;
}

Status Checkpoint::Read(const Entry& entry, std::span<std::byte> out) const {
  QP_CHECK_EQ(static_cast<int64_t>(out.size()), entry.bytes) << entry.slot;
  return ReadRange(entry, 0, out);
}

Status Checkpoint::ReadRange(const Entry& entry, int64_t offset, std::span<std::byte> out) const {
  QP_CHECK(offset >= 0 && offset + static_cast<int64_t>(out.size()) <= entry.bytes) << entry.slot << " at " << offset;
  int64_t begin = 0;  // of the piece, within the concatenation
  for (const Piece& piece : entry.pieces) {
    if (out.empty()) break;
    if (offset < begin + piece.bytes) {
      const int64_t within = offset - begin;
      const size_t count = std::min(out.size(), static_cast<size_t>(piece.bytes - within));
      RETURN_IF_ERROR(file(piece.file).Read(piece.offset + within, out.first(count)));
      out = out.subspan(count);
      offset += static_cast<int64_t>(count);
    }
    begin += piece.bytes;
  }
  return OkStatus();
}

Status Checkpoint::ReadAll(const StageTensors& weights, const ReadAllOptions& options) const {
  QP_CHECK(options.threads > 0);
  std::mutex mutex;
  int64_t done = 0;    // guarded by mutex
  Status first_error;  // guarded by mutex
  for (const Entry& entry : weights.entries) {
    if (!entry.alias_of.empty()) continue;
    ASSIGN_OR_RETURN(const std::span<std::byte> memory, options.place(entry));
    QP_CHECK_EQ(static_cast<int64_t>(memory.size()), entry.bytes) << entry.slot;
    std::atomic<int64_t> next{0};
    const auto reader = [&] {
      for (;;) {
        const int64_t begin = next.fetch_add(kReadChunkBytes);
        if (begin >= entry.bytes) return;
        const int64_t count = std::min(kReadChunkBytes, entry.bytes - begin);
        Status status = ReadRange(entry, begin, memory.subspan(static_cast<size_t>(begin), static_cast<size_t>(count)));
        std::lock_guard<std::mutex> lock(mutex);
        if (status.ok() && first_error.ok() && options.progress) status = options.progress(done += count, weights.report.bytes);
        if (!status.ok()) {
          if (first_error.ok()) first_error = status;
          next = entry.bytes;
          return;
        }
      }
    };
    const int64_t chunks = (entry.bytes + kReadChunkBytes - 1) / kReadChunkBytes;
    std::vector<std::thread> helpers;  // a tensor of one chunk needs none
    for (int64_t i = 1; i < std::min<int64_t>(options.threads, chunks); ++i) helpers.emplace_back(reader);
    reader();
    for (std::thread& helper : helpers) helper.join();
    if (!first_error.ok()) return first_error.WithContext("tensor " + entry.slot);
    if (options.placed) RETURN_IF_ERROR(options.placed(entry));
  }
  return OkStatus();
}

Status Checkpoint::VerifySha256(const std::function<void(int64_t, int64_t)>& progress) {
  if (!is_stage_export()) return FailedPreconditionError(dir_ + ": has no weights_manifest.json, so no checksums");
  int64_t total = 0, done = 0;
  for (const auto& [key, tensor] : manifest_) total += tensor.bytes;
  std::vector<std::byte> buffer(size_t{8} << 20);
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  QP_CHECK(context != nullptr);
  for (const auto& [key, promised] : manifest_) {
    ASSIGN_OR_RETURN(const TensorInfo info, Info(key));
    ASSIGN_OR_RETURN(const SafetensorsFile* file, File(key_to_file_.at(key)));
    QP_CHECK(EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1);
    for (int64_t at = 0; at < info.bytes;) {
      const size_t count = std::min<size_t>(buffer.size(), static_cast<size_t>(info.bytes - at));
      RETURN_IF_ERROR(file->Read(info.offset + at, std::span(buffer).first(count)));
      QP_CHECK(EVP_DigestUpdate(context.get(), buffer.data(), count) == 1);
      at += static_cast<int64_t>(count);
      done += static_cast<int64_t>(count);
      if (progress) progress(done, total);
    }
    unsigned char digest[32];
    QP_CHECK(EVP_DigestFinal_ex(context.get(), digest, nullptr) == 1);
    std::string hex;
    char pair[3];
    for (const unsigned char byte : digest) {
      std::snprintf(pair, sizeof(pair), "%02x", byte);
      hex += pair;
    }
    if (hex != promised.sha256) return DataLossError(dir_ + "/" + key_to_file_.at(key) + ": tensor " + key + ": sha256 is " + hex + ", the manifest says " + promised.sha256);
  }
  return OkStatus();
}

}  // namespace qwen::weights

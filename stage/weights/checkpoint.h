// stage/weights/checkpoint.h — a checkpoint directory: finds the tensors of one stage, says what does not fit, and reads
// exactly their byte ranges (pread, no mmap: a page that the kernel evicts again must not stall a forward pass).
//
// Forms of a directory, told apart by what lies in it:
//   hub        config.json + model.safetensors, or + model.safetensors.index.json and its shards
//   stage      hf_config.json + weights_manifest.json + safetensors: one stage of a python_export
//   export     stage-KK-of-SS/ folders of that form: OpenStage() picks the one asked for
//
// Thread safety: Open* and ResolveStage by one thread; Read* from any threads at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stage/base/status.h"
#include "stage/weights/safetensors.h"
#include "stage/weights/weight_map.h"

namespace qwen::weights {

// A contiguous run of bytes in one file.
struct Piece {
  std::string key;  // tensor on disk
  std::string file;  // name inside the checkpoint directory
  int64_t offset = 0, bytes = 0;
};

enum class Transform {
  kNone,
  kTransposeLastTwo  // stored (E, C, R): the caller swaps the last two axes to get `shape` (E, R, C)
};

// Where one slot's bytes are. The stored tensor is the concatenation of all pieces.
struct Entry {
  std::string slot;
  std::vector<int64_t> shape;         // as stage/ holds it (weight_map.h)
  std::vector<int64_t> stored_shape;  // == shape, or its last two axes swapped when transform says so
  StoredDtype dtype = StoredDtype::kBFloat16;  // kBFloat16, kFloat32 or (with a "_scale_inv" entry) kFloat8E4M3
  Transform transform = Transform::kNone;
  int64_t bytes = 0;                  // of all pieces
  std::vector<Piece> pieces;
  std::string alias_of;               // not empty: no bytes of its own, the tensor of that slot on the same stage (tied head)
};

struct Report {
  std::vector<std::string> loaded;      // slots
  std::vector<std::string> missing;     // "tensor model.norm.weight: missing, expected [4096]"
  std::vector<std::string> mismatched;  // "tensor X: expected [8192, 4096], found [4096, 4096] in FILE"
  std::vector<std::string> unexpected;  // "tensor Y: not part of this model (94 layers), found in FILE"
  int64_t bytes = 0;                    // that this stage reads
  bool ok() const { return missing.empty() && mismatched.empty() && unexpected.empty(); }
  // OK, or kDataLoss with up to 8 of the lines above and how many more there are.
  Status ToStatus() const;
};

// Called while weights are loaded, one call at a time, with a number that only rises; an error ends the loading with it.
using LoadProgress = std::function<Status(int64_t bytes_done, int64_t bytes_total)>;

struct StageTensors {
  std::vector<Entry> entries;  // in load order
  Report report;
  const Entry* Find(std::string_view slot) const;  // null when there is none
};

class Checkpoint {
 public:
  // Reads the index (hub) or the manifest (stage), opens no shard yet. kNotFound, kDataLoss naming file and reason.
  static Result<Checkpoint> Open(const std::string& dir);
  // Open(dir), or Open(dir/stage-KK-of-SS) when `dir` holds a per-stage export.
  static Result<Checkpoint> OpenStage(const std::string& dir, int32_t index, int32_t stages);

  Checkpoint(Checkpoint&&) = default;
  Checkpoint& operator=(Checkpoint&&) = default;

  const std::string& dir() const { return dir_; }
  bool is_stage_export() const { return !manifest_.empty(); }

  // Finds every tensor of the stage. Opens only the files that hold one of them (so `unexpected` is judged by name). A
  // Status is a file that cannot be read; what does not fit is in the report, which the caller turns into its exit.
  Result<StageTensors> ResolveStage(const contract::ModelShape& shape, const StageSpec& spec);

  // All of an entry, in stored order. REQUIRES: out.size() == entry.bytes.
  Status Read(const Entry& entry, std::span<std::byte> out) const;
  // A part of it: `offset` counts within the concatenated pieces. REQUIRES: offset + out.size() <= entry.bytes.
  Status ReadRange(const Entry& entry, int64_t offset, std::span<std::byte> out) const;

  struct ReadAllOptions {
    // Memory for an entry's stored bytes (exactly entry.bytes), valid until `placed` was called for it. Not for aliases.
    std::function<Result<std::span<std::byte>>(const Entry&)> place;
    std::function<Status(const Entry&)> placed;  // the bytes are there; may be empty
    LoadProgress progress;  // after every kReadChunkBytes, from the readers' threads; may be empty
    int32_t threads = 4;  // readers of one entry: one NVMe or page-cache stream gives about 2 GB/s, four about 6
  };
  static constexpr int64_t kReadChunkBytes = 64 << 20;
  // Reads entries one after another, each with `threads` readers; memory beyond the caller's: none.
  Status ReadAll(const StageTensors& weights, const ReadAllOptions& options) const;

  // An opened file. REQUIRES: `name` is the file of a piece that ResolveStage found.
  const SafetensorsFile& file(const std::string& name) const;

  // Compares a stage export's files with the sha256 of its manifest, tensor by tensor. kDataLoss names the tensor;
  // kFailedPrecondition when this is no stage export.
  Status VerifySha256(const std::function<void(int64_t bytes_done, int64_t bytes_total)>& progress = {});

 private:
  struct ManifestTensor {
    std::string dtype;
    std::vector<int64_t> shape;
    int64_t bytes = 0;
    std::string sha256;
  };
  explicit Checkpoint(std::string dir) : dir_(std::move(dir)) {}
  Result<const SafetensorsFile*> File(const std::string& name);
  Status ReadManifest();
  Result<TensorInfo> Info(const std::string& key);  // REQUIRES: key_to_file_ has it
  bool Has(const std::string& key) const { return key_to_file_.count(key) > 0; }
  const Source* Choose(const Slot& slot) const;     // null when not one key of any source is there
  Status Resolve(const contract::ModelShape& shape, const Slot& slot, StageTensors& out);
  Status ResolveScale(const contract::ModelShape& shape, const Slot& slot, const Source& source, Transform transform, StageTensors& out);
  void FindUnexpected(const contract::ModelShape& shape, Report& report) const;

  std::string dir_;
  std::map<std::string, std::string> key_to_file_;
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> files_;  // opened so far, by name
  std::map<std::string, ManifestTensor> manifest_;                       // stage export only
};

}  // namespace qwen::weights

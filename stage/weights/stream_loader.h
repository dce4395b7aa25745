// stage/weights/stream_loader.h — LoadMethod::kOverlapped: the tensors are made first, then every request's bytes go to their
// place while the next ones are read.
//
// On a CPU a tensor that is stored as it is held is read straight into its own memory; all others come through the ring and
// are placed row by row (place_rows.h) by the reading threads. On a GPU the ring is pinned memory: a request's bytes are
// copied on a stream of their own and transposed, multiplied out and converted there, one event a buffer. Scales of FP8 blocks
// are read before everything else. Memory: the tensors, the ring, on a GPU some requests in device memory.
#pragma once
#include "stage/weights/checkpoint.h"
#include "stage/weights/loader.h"
#include "stage/weights/reader.h"

namespace qwen::weights {

struct StreamOptions {
  int64_t request_bytes = 8 << 20;
  ReadPartsOptions read;         // lanes and progress are LoadOptions' own
  bool device_operators = false;  // for tests: on a CPU the way of a GPU
};
// As LoadTensors. REQUIRES: found.report.ok().
Result<TensorMap> StreamTensors(const Checkpoint& checkpoint, const contract::ModelShape& shape, const StageTensors& found, const LoadOptions& options,
                                const StreamOptions& stream = {});

}  // namespace qwen::weights

// stage/transport/nccl_edge.h — hidden states between GPUs: one 2-rank NCCL communicator an edge and epoch.
//
// The only place of the project that knows NCCL; built into libqwen_nccl.so, which a GPU stage opens. Buffers are device
// memory. Send only enqueues, in order with the compute stream through events; Receive returns when the bytes are there (a
// stage that waits for its neighbour must not look like one whose own compute hangs). The caller alternates between two
// buffers, by step; the compute stream is made to wait until a buffer may be written again.
//
//   compute  --event--> send stream: ncclSend(step) --event--> compute stream, two steps later
//   recv stream: ncclRecv(step), not before the compute of step - 2 is done --event--> compute stream
//
// A lost neighbour: its end of the TCP connection closes (or the head says so); Abort calls ncclCommAbort, which ends the
// kernels in flight. ncclCommGetAsyncError stays 0 when a peer is killed while it blocks, so it is asked but not relied on.
// REQUIRES: two different GPUs (NCCL refuses two ranks on one). Bytes are not checksummed: NVLink and InfiniBand are.
#pragma once
#include "stage/transport/edge.h"

namespace qwen::transport {

// `stream`: the cudaStream_t on which the stage computes, of the device that is current on the calling thread.
std::unique_ptr<EdgeTransport> MakeNcclEdges(void* stream);

}  // namespace qwen::transport

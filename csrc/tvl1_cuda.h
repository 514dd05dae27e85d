// Calls of the CUDA kernels (tvl1_cuda.cu), without torch. A failed launch throws std::runtime_error.
#pragma once
#include <cuda_runtime.h>

#include "tvl1.h"

namespace goca::tvl1::cuda {
constexpr int64_t BATCH = 256;  // pairs together, at most

struct Control {  // of a pair
  int active, flow, dual;  // whether it iterates; which of two planes hold the newest u, and p
  int finished;            // blocks that have finished the iteration
};

size_t workspace_bytes(const Args&, int64_t pairs);

// Flow of pairs first .. first + pairs of all, in `workspace` on the device and `pinned` [2 * pairs] on the host; waits
// for the device now and then.
void flow(const Args&, int64_t first, int64_t pairs, void* workspace, Control* pinned, cudaStream_t);
}  // namespace goca::tvl1::cuda

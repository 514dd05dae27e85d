// The CUDA kernels' entry points (tvl1_cuda.cu), without torch. A failed launch throws std::runtime_error.
#pragma once
#include <cuda_runtime.h>

#include "tvl1.h"

namespace goca::tvl1::cuda {
size_t workspace_bytes(const Args&, int64_t pairs);

// Flow of pairs first .. first + pairs of all, in `workspace` on the device; waits for the device now and then.
void flow(const Args&, int64_t first, int64_t pairs, void* workspace, cudaStream_t);
}  // namespace goca::tvl1::cuda

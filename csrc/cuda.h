// Calls of the CUDA kernels (cuda_*.cu); like goca.h, without torch. They are asynchronous, allocate nothing, and may
// be captured in a CUDA graph. A failed launch throws std::runtime_error.
#pragma once
#include <cuda_runtime.h>

#include "goca.h"

namespace goca::cuda {
template <typename T> void solve(const AssignArgs<T>&, const Solution<T>&, cudaStream_t);
template <typename T> void log_assignment(const AssignArgs<T>&, const Solution<T>&, cudaStream_t);
template <typename T> void swapped_loss(const LossArgs<T>&, cudaStream_t);
}  // namespace goca::cuda

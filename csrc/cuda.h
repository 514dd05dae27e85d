// The CUDA kernels' entry points (cuda_*.cu); as goca.h, without torch. They return before the device is done, never wait
// for it, allocate nothing, and may be captured in a CUDA graph. A failed launch throws std::runtime_error.
#pragma once
#include <cuda_runtime.h>

#include "goca.h"

namespace goca::cuda {
template <typename T> void solve(const AssignArgs<T>&, const Solved<T>&, cudaStream_t);
template <typename T> void log_assignment(const AssignArgs<T>&, const Solved<T>&, cudaStream_t);
template <typename T> void swapped_loss(const LossArgs<T>&, cudaStream_t);
}  // namespace goca::cuda

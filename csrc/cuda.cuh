// What the two files of CUDA kernels share. No torch here: nvcc alone compiles them, and tests/cuda_on_cpu/ runs them
// without a GPU.
#pragma once
#include "cuda.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace goca::cuda {
namespace {

constexpr int THREADS = 256, WARP_SIZE = 32, WARPS_PER_BLOCK = THREADS / WARP_SIZE;
constexpr int64_t MAX_BLOCKS = 1 << 20;  // of a launch; its blocks stride over more
constexpr unsigned FULL_WARP_MASK = 0xffffffff;

#ifndef GOCA_EMULATED
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ double bytes[];
  return reinterpret_cast<T*>(bytes);
}
#endif

__device__ inline float exp2(float t) { return exp2f(t); }
__device__ inline double exp2(double t) { return ::exp2(t); }

__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename T>
__device__ T maximum(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
__device__ T warp_sum(T x) {
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP_MASK, x, offset);
  return x;
}

template <typename T>
__device__ T warp_max(T x) {
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) x = maximum(__shfl_xor_sync(FULL_WARP_MASK, x, offset), x);
  return x;
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("goca: ") + what + ": " + cudaGetErrorString(error));
}

template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), bool cooperative, int64_t blocks, int threads, size_t shared,
            cudaStream_t stream, Args... args) {
  void* pointers[] = {&args...};
  const dim3 grid(static_cast<unsigned>(std::min(blocks, MAX_BLOCKS))), block(static_cast<unsigned>(threads));
  check(cooperative ? cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared, stream)
                    : cudaLaunchKernel(kernel, grid, block, pointers, shared, stream),
        name);
}

}  // namespace
}  // namespace goca::cuda

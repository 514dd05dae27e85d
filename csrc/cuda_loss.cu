// Loss and gradient on NVIDIA GPUs (Eqs. 2, 12, 13).
//
// A block owns a sample of one view, its warps the crops. Targets are formed once in shared memory where they
// fit. Two passes over a row: max and sums, then the gradient, the exponential being cheaper than a store.
//
// Types: sums within a row in T, across rows and chunks in double. Sizes and indices are 64 bit.
#include "cuda.cuh"

namespace goca::cuda {
namespace {

constexpr size_t MAX_SHARED_BYTES = 48 << 10;  // bytes that every gpu grants a block

// D_j of assigning crop k for sample i of a view
template <typename T>
__device__ T target(const LossArgs<T>& a, int64_t view, int64_t k, int64_t i, int64_t j) {
  if (a.log_targets.data) {
    const Matrices<T>& t = a.log_targets;
    return exp2(T(LOG2E) * t.data[view * t.view + k * t.crop + i * t.row + j]);
  }
  const int64_t b = view * a.assigning + k, row = b * a.M + a.first_row + i;
  return a.solution.u[row] * a.solution.E[row * a.N + j] * a.solution.v[b * a.N + j];
}

// As in cpu_loss.cpp: with t = sum of D over the assigning crops but this one,
//   loss += sum(t) (max / tau + log sum exp((S - max) / tau)) - <t, S> / tau,   dloss/dS = (sum(t) softmax - t) / tau
template <typename T>
__global__ void __launch_bounds__(THREADS) sample_loss(LossArgs<T> a, bool in_shared) {
  double* crop_terms = shared_memory<double>();             // [crops]
  T* targets = reinterpret_cast<T*>(crop_terms + a.crops);  // [assigning, N] if in_shared
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE, warps = blockDim.x / WARP_SIZE;
  const int64_t N = a.N, A = a.assigning;
  const T scale = T(LOG2E * a.inverse_temperature), gradient_scale = T(a.weight * a.inverse_temperature);
  for (int64_t item = blockIdx.x; item < a.views * a.m; item += gridDim.x) {
    const int64_t view = item / a.m, i = item % a.m;
    if (in_shared) {
      for (int64_t k = 0; k < A; ++k) {
        for (int64_t j = threadIdx.x; j < N; j += blockDim.x) targets[k * N + j] = target(a, view, k, i, j);
      }
      __syncthreads();
    }
    for (int64_t crop = warp; crop < a.crops; crop += warps) {
      const T* S = a.scores.data + view * a.scores.view + crop * a.scores.crop + i * a.scores.row;
      const auto t_of = [&](int64_t j) {  // the sum over the other assigning crops
        T t = 0;
        for (int64_t k = 0; k < A; ++k) {
          if (k != crop) t += in_shared ? targets[k * N + j] : target(a, view, k, i, j);
        }
        return t;
      };
      T top = -INFINITY, sum = 0, mass = 0, distance = 0;  // distance: <t, max - S>
      for (int64_t j = lane; j < N; j += WARP_SIZE) top = maximum(S[j], top);
      top = warp_max(top);
      for (int64_t j = lane; j < N; j += WARP_SIZE) {
        const T below = S[j] - top, t = t_of(j);
        sum += exp2(scale * below);
        mass += t;
        distance -= t * below;
      }
      sum = warp_sum(sum), mass = warp_sum(mass), distance = warp_sum(distance);
      if (a.gradient) {
        T* g = a.gradient + ((view * a.crops + crop) * a.m + i) * N;
        const T softmax = gradient_scale * mass / sum;
        for (int64_t j = lane; j < N; j += WARP_SIZE) {
          g[j] = softmax * exp2(scale * (S[j] - top)) - gradient_scale * t_of(j);
        }
      }
      if (lane == 0) crop_terms[crop] = double(mass) * log(double(sum)) + double(distance) * a.inverse_temperature;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double loss = 0;
      for (int64_t crop = 0; crop < a.crops; ++crop) loss += crop_terms[crop];
      a.terms[item] = loss * a.weight;
    }
    __syncthreads();
  }
}

// One block: the samples' parts in a fixed order.
template <typename T>
__global__ void __launch_bounds__(THREADS) total_loss(LossArgs<T> a) {
  double* parts = shared_memory<double>();  // [THREADS]
  double sum = 0;
  for (int64_t item = threadIdx.x; item < a.views * a.m; item += THREADS) sum += a.terms[item];
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int k = 1; k < THREADS; ++k) sum += parts[k];
    *a.loss = T(sum);
  }
}

}  // namespace

template <typename T>
void swapped_loss(const LossArgs<T>& a, cudaStream_t stream) {
  const size_t terms = a.crops * sizeof(double), targets = a.assigning * a.N * sizeof(T);
  const bool in_shared = terms + targets <= MAX_SHARED_BYTES;
  const int threads = WARP_SIZE * static_cast<int>(std::min<int64_t>(a.crops, WARPS_PER_BLOCK));
  const size_t shared = terms + (in_shared ? targets : 0);
  launch("sample_loss", sample_loss<T>, false, a.views * a.m, threads, shared, stream, a, in_shared);
  launch("total_loss", total_loss<T>, false, 1, THREADS, THREADS * sizeof(double), stream, a);
}

template void swapped_loss<float>(const LossArgs<float>&, cudaStream_t);
template void swapped_loss<double>(const LossArgs<double>&, cudaStream_t);

}  // namespace goca::cuda

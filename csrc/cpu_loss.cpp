// Loss and gradient on the CPU (Eqs. 2, 12, 13), one sample of one view after the other; they need A + 2 rows of N a
// thread.
#include "cpu.h"

namespace goca::cpu {
namespace {

template <typename T>
struct Sample {
  const T* scores;  // [crops, N] with stride
  int64_t crop_stride, crops, assigning, N;
  const T* log_targets;  // [assigning, N] with stride, or nullptr:
  int64_t target_stride;
  const T *E, *u, *v;  // then D_aj = u_a E_aj v_aj
  int64_t E_stride, u_stride, v_stride;
  T inverse_temperature, weight;
  T *targets, *total, *work;  // [assigning, N], [N], [N] scratch
  T* gradient;  // [crops, N] with stride, or nullptr
  int64_t gradient_stride;
  double* term;
};

// Each crop's softmax is formed once and meets the sum of its targets: with t = sum of D over the assigning crops but
// this,
//   loss += sum(t) (max / tau + log sum exp((S - max) / tau)) - <t, S> / tau,   dloss/dS = (sum(t) softmax - t) / tau
template <typename T>
INLINE void sample_loss_of(const Sample<T>& a) {
  const int64_t N = a.N, A = a.assigning;
  std::fill(a.total, a.total + N, T(0));
  T* total = a.total;
  for (int64_t k = 0; k < A; ++k) {
    T* d = a.targets + k * N;
    if (a.log_targets) {
      const T* log_d = a.log_targets + k * a.target_stride;
      SIMD for (int64_t j = 0; j < N; ++j) total[j] += d[j] = exp2_fast(minimum(T(LOG2E) * log_d[j], T(128)));
    } else {
      const T *E = a.E + k * a.E_stride, *v = a.v + k * a.v_stride, u = a.u[k * a.u_stride];
      prefetch(k + 1 < A ? E + a.E_stride : a.scores, N);
      SIMD for (int64_t j = 0; j < N; ++j) total[j] += d[j] = u * E[j] * v[j];
    }
  }
  const T scale = T(LOG2E) * a.inverse_temperature, gradient_scale = a.weight * a.inverse_temperature;
  double loss = 0;
  for (int64_t crop = 0; crop < a.crops; ++crop) {
    const T* t = total;
    if (crop < A) {  // its own assignment is no target of its own
      T* others = a.work;
      std::fill(others, others + N, T(0));
      for (int64_t k = 0; k < A; ++k) {
        const T* d = a.targets + k * N;
        if (k != crop) {
          SIMD for (int64_t j = 0; j < N; ++j) others[j] += d[j];
        }
      }
      t = others;
    }
    const T* S = a.scores + crop * a.crop_stride;
    if (crop + 1 < a.crops) prefetch(S + a.crop_stride, N);
    T top = -std::numeric_limits<T>::infinity();
    const int64_t quarter = N / 4;  // a tree of comparisons waits less for itself than a chain
    SIMD_MAX(top) for (int64_t j = 0; j < quarter; ++j) {
      const T a0 = maximum(S[j], S[quarter + j]), a1 = maximum(S[2 * quarter + j], S[3 * quarter + j]);
      top = maximum(maximum(a0, a1), top);
    }
    for (int64_t j = 4 * quarter; j < N; ++j) top = maximum(S[j], top);
    T sum = 0, mass = 0, distance = 0;  // distance: <t, max - S>
    T* g = a.gradient ? a.gradient + crop * a.gradient_stride : nullptr;
    if (g) {
      SIMD_SUM(sum, mass, distance) for (int64_t j = 0; j < N; ++j) {
        const T below = S[j] - top;
        sum += g[j] = exp2_fast(scale * below);
        mass += t[j];
        distance -= t[j] * below;
      }
      const T softmax = gradient_scale * mass / sum;
      SIMD for (int64_t j = 0; j < N; ++j) g[j] = softmax * g[j] - gradient_scale * t[j];
    } else {
      SIMD_SUM(sum, mass, distance) for (int64_t j = 0; j < N; ++j) {
        const T below = S[j] - top;
        sum += exp2_fast(scale * below);
        mass += t[j];
        distance -= t[j] * below;
      }
    }
    loss += double(mass) * std::log(double(sum)) + double(distance) * a.inverse_temperature;
  }
  *a.term = loss * a.weight;
}
FOR_BOTH_TYPES(sample_loss, Sample)

}  // namespace

template <typename T>
void swapped_loss(const LossArgs<T>& a) {
  const int64_t A = a.assigning, N = a.N;
  const int64_t grain = std::max<int64_t>(1, MIN_ENTRIES_PER_THREAD / (a.crops * N));
  at::parallel_for(0, a.views * a.m, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch((A + 2) * N);
    T* rows = scratch.data();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t view = item / a.m, i = item % a.m;
      Sample<T> x{};
      x.scores = a.scores.data + view * a.scores.view + i * a.scores.row;
      x.crop_stride = a.scores.crop, x.crops = a.crops, x.assigning = A, x.N = N;
      if (a.log_targets.data) {
        x.log_targets = a.log_targets.data + view * a.log_targets.view + i * a.log_targets.row;
        x.target_stride = a.log_targets.crop;
      } else {
        const int64_t b = view * A, row = b * a.M + a.first_row + i;
        x.E = a.solution.E + row * N, x.u = a.solution.u + row, x.v = a.solution.v + b * N;
        x.E_stride = a.M * N, x.u_stride = a.M, x.v_stride = N;
      }
      x.inverse_temperature = T(a.inverse_temperature), x.weight = T(a.weight);
      x.targets = rows, x.total = rows + A * N, x.work = rows + (A + 1) * N;
      if (a.gradient) x.gradient = a.gradient + (view * a.crops * a.m + i) * N;
      x.gradient_stride = a.m * N;
      x.term = a.terms + item;
      sample_loss(x);
    }
  });
  double loss = 0;
  for (int64_t item = 0; item < a.views * a.m; ++item) loss += a.terms[item];
  *a.loss = T(loss);
}

template void swapped_loss<float>(const LossArgs<float>&);
template void swapped_loss<double>(const LossArgs<double>&);

}  // namespace goca::cpu

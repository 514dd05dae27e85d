// csrc/cuda_*.cu on the CPU for test_cuda_on_cpu.py (ctypes): contiguous arrays in, called as by bindings.cpp.
#include "../../csrc/cuda_assign.cu"
#include "../../csrc/cuda_loss.cu"

// All that a call needs, with every size and number in one place; unused ones are zero or null. test_cuda_on_cpu.py
// mirrors it.
template <typename T>
struct Call {
  const T *scores, *log_prior, *log_targets, *batch_scores;
  T *log_d, *loss, *gradient;
  int64_t views, crops, assigning, m, N, M, first_row, rgb_prior, flow_prior, prior_sign, iters;
  double lambda1, lambda2, temperature;
};

template <typename T>
goca::Matrices<T> matrices(const T* x, int64_t crops, int64_t rows, int64_t N) {
  return {x, crops * rows * N, rows * N, N};
}

// The crops of `scores` [views, assigning, M, N], solved in E.
template <typename T>
goca::Solution<T> solve(const Call<T>& c, const T* scores, T* E, std::vector<T>& rest, bool take_log) {
  const int64_t A = c.assigning, B = c.views * A;
  rest.assign(goca::potentials_size(B, c.M, c.N, goca::CUDA_CHUNK), T(NAN));
  const goca::AssignArgs<T> a{c.views, A, c.M, c.N, matrices(scores, A, c.M, c.N), matrices(c.log_prior, A, c.M, c.N),
                              {c.rgb_prior != 0, c.flow_prior != 0}, c.lambda1, c.lambda2, int(c.prior_sign), c.iters};
  const auto solution = goca::partition(E, rest.data(), B, c.M, c.N, goca::CUDA_CHUNK);
  goca::cuda::solve(a, solution, nullptr);
  if (take_log) goca::cuda::log_assignment(a, solution, nullptr);
  return solution;
}

template <typename T>
void run(const Call<T>& c) {
  std::vector<T> rest;
  if (c.log_d) {
    solve(c, c.scores, c.log_d, rest, true);
    return;
  }
  std::vector<double> terms(c.views * c.m, NAN);
  std::vector<T> E(c.batch_scores ? c.views * c.assigning * c.M * c.N : 0, T(NAN));
  goca::LossArgs<T> a{};
  a.views = c.views, a.crops = c.crops, a.assigning = c.assigning, a.m = c.m, a.N = c.N;
  a.M = c.M, a.first_row = c.first_row;
  a.scores = matrices(c.scores, c.crops, c.m, c.N);
  a.inverse_temperature = 1 / c.temperature;
  a.weight = 1. / (c.views * c.m * c.assigning * (c.crops - 1));
  if (c.batch_scores) {
    a.solution = solve(c, c.batch_scores, E.data(), rest, false);
  } else {
    a.log_targets = matrices(c.log_targets, c.assigning, c.m, c.N);
  }
  a.loss = c.loss, a.gradient = c.gradient, a.terms = terms.data();
  goca::cuda::swapped_loss(a, nullptr);
}

extern "C" void run_f32(const Call<float>* c) { run(*c); }
extern "C" void run_f64(const Call<double>* c) { run(*c); }
extern "C" void set_gpu(int64_t l2_bytes, int64_t blocks_at_once, int64_t order) {
  emulated::l2_bytes = l2_bytes, emulated::blocks_at_once = blocks_at_once, emulated::order = int(order);
}

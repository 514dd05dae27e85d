// The assignment on NVIDIA GPUs (Eqs. 5-10). The algorithm and why it is safe: goca.h.
//
// The rounds are a sequence of small phases, each a function over its pass's problems and chunks of CUDA_CHUNK = 8
// rows. In the column phases a thread owns columns and walks down the chunk's rows, so that loads are coalesced; in
// `sweep` a warp first owns a row and sums it for u_i, and then threads own columns again for the next round's sums,
// the chunk still in the first-level cache. Partial column sums are joined in a fixed order, in double, without
// atomics: runs repeat bit for bit. At the method's sizes (four problems of 640 x 1000: 10 MB) launches cost more than
// arithmetic. So where E and the scores fit in the L2 cache, all phases run in one cooperative launch with barriers
// across the grid; beyond, each phase is a launch of its own (`each_phase` is the one sequence for both). Nothing is
// read through the read-only cache that another block writes.
//
// Types: sums within a row in T, across rows and chunks in double. Sizes and indices are 64 bit.
#include "cuda.cuh"

#include <cooperative_groups.h>

#include <atomic>

namespace goca::cuda {
namespace {

constexpr size_t PHASE_SHARED = THREADS * sizeof(double);
constexpr int MAX_DEVICES = 64;

static_assert(WARPS_PER_BLOCK == CUDA_CHUNK, "in a sweep each warp owns one row of the chunk");

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: the phases
// ---------------------------------------------------------------------------------------------------------------------
template <typename T>
struct Row {  // row i of problem b
  const T *S, *X;
  T *E, *f, *g, *u;
};

template <typename T>
__device__ Row<T> row_of(const Problems<T>& g, const Pass<T>& pass, int64_t b, int64_t i) {
  const int64_t row = b * g.a.M + i;
  return {g.scores(b, i), pass.prior ? g.prior(b, i) : nullptr, g.s.E + row * g.a.N, g.s.f + row, g.s.g + row,
          g.s.u + row};
}

// x_ij + shift, rounded once. Left to the compiler, some phases fuse and others don't: then c_j is no maximum of the
// x_ij that E is made of.
template <typename T>
__device__ T exponent(const Pass<T>& pass, const Row<T>& row, int64_t j, T shift) {
  return multiply_add(pass.p, row.S[j], row.X ? multiply_add(pass.q, row.X[j], shift) : shift);
}

template <typename T>
struct Column {  // the maximum c_j of column j, in one of the two
  T early, late;
};

template <typename T>
__device__ Column<T> column_of(const Problems<T>& g, int64_t b, int64_t j) {
  return {g.s.c[b * g.a.N + j], g.s.late[b * g.a.N + j]};
}

// x_ij - c_j: the exponent of E before a row is rebuilt
template <typename T>
__device__ T shifted_exponent(const Pass<T>& pass, const Row<T>& row, int64_t j, T f, const Column<T>& c) {
  return exponent(pass, row, j, f - c.early) - c.late;
}

// f_i with what the rounds since it was last complete have made of row i
template <typename T>
__device__ T row_potential(T f, T u, T g) {
  return f + (log2(u) - g);
}

// partial_j = max_i x_ij over the chunk
template <typename T>
__device__ void column_max(const Problems<T>& g, const Pass<T>& pass) {
  for (int64_t item = pass.first * g.s.chunks + blockIdx.x; item < pass.last * g.s.chunks; item += gridDim.x) {
    const int64_t b = item / g.s.chunks, first = item % g.s.chunks * CUDA_CHUNK;
    const int rows = g.a.M - first < CUDA_CHUNK ? g.a.M - first : CUDA_CHUNK;
    for (int64_t j = threadIdx.x; j < g.a.N; j += THREADS) {
      T top = -INFINITY;
      for (int k = 0; k < rows; ++k) {
        const Row<T> row = row_of(g, pass, b, first + k);
        top = maximum(exponent(pass, row, j, *row.f), top);
      }
      g.s.partial[item * g.a.N + j] = top;
    }
  }
}

// E_ij = exp2(x_ij - c_j), partial_j = sum_i E_ij over the chunk, g_i = 0
template <typename T>
__device__ void exponentiate(const Problems<T>& g, const Pass<T>& pass) {
  for (int64_t item = pass.first * g.s.chunks + blockIdx.x; item < pass.last * g.s.chunks; item += gridDim.x) {
    const int64_t b = item / g.s.chunks, first = item % g.s.chunks * CUDA_CHUNK;
    const int rows = g.a.M - first < CUDA_CHUNK ? g.a.M - first : CUDA_CHUNK;
    for (int64_t j = threadIdx.x; j < g.a.N; j += THREADS) {
      const Column<T> c = column_of(g, b, j);
      T sum = 0;
      for (int k = 0; k < rows; ++k) {
        const Row<T> row = row_of(g, pass, b, first + k);
        const T e = exp2(shifted_exponent(pass, row, j, *row.f, c));
        row.E[j] = e;
        sum += e;
      }
      g.s.partial[item * g.a.N + j] = sum;
    }
    if (threadIdx.x < rows) *row_of(g, pass, b, first + threadIdx.x).g = 0;
  }
}

// Over all chunks: c_j = max partial_j, or v_j = 1 / sum partial_j. Warps take chunks in turn, lanes columns.
template <bool MAX, typename T>
__device__ void combine(const Problems<T>& g, const Pass<T>& pass) {
  double* parts = shared_memory<double>();  // [WARPS_PER_BLOCK, WARP_SIZE]
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  const int64_t N = g.a.N, first = pass.first * N, last = pass.last * N;
  for (int64_t group = blockIdx.x; first + group * WARP_SIZE < last; group += gridDim.x) {
    const int64_t bj = first + group * WARP_SIZE + lane;
    double x = MAX ? -INFINITY : 0;
    if (bj < last) {
      const T* column = g.s.partial + bj / N * g.s.chunks * N + bj % N;
      for (int64_t k = warp; k < g.s.chunks; k += WARPS_PER_BLOCK) {
        x = MAX ? maximum(double(column[k * N]), x) : x + column[k * N];
      }
    }
    parts[threadIdx.x] = x;
    __syncthreads();
    if (warp == 0 && bj < last) {
      for (int k = 1; k < WARPS_PER_BLOCK; ++k) {
        const double part = parts[k * WARP_SIZE + lane];
        x = MAX ? maximum(part, x) : x + part;
      }
      if (MAX) {
        const bool early = fabs(x) < EARLY_LIMIT<T>;
        g.s.c[bj] = early ? T(x) : T(0);
        g.s.late[bj] = early ? T(0) : T(x);
      } else {
        g.s.v[bj] = T(1 / x);
      }
    }
    __syncthreads();
  }
}

// u_i = 1 / sum_j E_ij v_j, a row that vanishes being rebuilt first; partial_j = sum_i u_i E_ij over the chunk.
// Before another group f_i takes log2 u_i - g_i.
template <typename T>
__device__ void sweep(const Problems<T>& g, const Pass<T>& pass, bool complete) {
  T* u = shared_memory<T>();  // [CUDA_CHUNK]
  const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
  const int64_t N = g.a.N;
  for (int64_t item = pass.first * g.s.chunks + blockIdx.x; item < pass.last * g.s.chunks; item += gridDim.x) {
    const int64_t b = item / g.s.chunks, first = item % g.s.chunks * CUDA_CHUNK;
    const int rows = g.a.M - first < CUDA_CHUNK ? g.a.M - first : CUDA_CHUNK;
    const T* v = g.s.v + b * N;
    if (warp < rows) {
      const Row<T> row = row_of(g, pass, b, first + warp);
      const T f = *row.f;
      T sum = 0;
      for (int64_t j = lane; j < N; j += WARP_SIZE) sum += row.E[j] * v[j];
      sum = warp_sum(sum);
      if (sum < T(REBUILD_BELOW)) {
        T top = -INFINITY;
        for (int64_t j = lane; j < N; j += WARP_SIZE) {
          top = maximum(shifted_exponent(pass, row, j, f, column_of(g, b, j)), top);
        }
        top = warp_max(top);
        sum = 0;
        for (int64_t j = lane; j < N; j += WARP_SIZE) {
          const T e = exp2(shifted_exponent(pass, row, j, f, column_of(g, b, j)) - top);
          row.E[j] = e;
          sum += e * v[j];
        }
        sum = warp_sum(sum);
        if (lane == 0) *row.g = top;
      }
      if (lane == 0) {
        *row.u = u[warp] = 1 / sum;
        if (complete) *row.f = row_potential(f, *row.u, *row.g);
      }
    }
    __syncthreads();
    for (int64_t j = threadIdx.x; j < N; j += THREADS) {
      T sum = 0;
      for (int k = 0; k < rows; ++k) sum += u[k] * g.s.E[(b * g.a.M + first + k) * N + j];
      g.s.partial[item * N + j] = sum;
    }
    __syncthreads();
  }
}

// Eqs. 6, 7: a view with a prior starts from r times the other's row potential. pass: the one to come.
template <typename T>
__device__ void start_from_prior(const Problems<T>& g, const Pass<T>& pass) {
  const int64_t half = g.a.crops * g.a.M;
  const Solution<T>& s = g.s;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < half; i += int64_t(gridDim.x) * THREADS) {
    const T of_rgb = g.a.prior_views[1] ? row_potential(s.f[i], s.u[i], s.g[i]) : T(0);
    if (g.a.prior_views[0]) s.f[i] = pass.r * row_potential(s.f[half + i], s.u[half + i], s.g[half + i]);
    if (g.a.prior_views[1]) s.f[half + i] = pass.r * of_rgb;
  }
}

// E_ij = log D_ij = ln 2 (x_ij - c_j - g_i + log2 u_i + log2 v_j)
template <typename T>
__device__ void take_log(const Problems<T>& g, const Pass<T>& pass) {
  for (int64_t item = pass.first * g.s.chunks + blockIdx.x; item < pass.last * g.s.chunks; item += gridDim.x) {
    const int64_t b = item / g.s.chunks, first = item % g.s.chunks * CUDA_CHUNK;
    const int rows = g.a.M - first < CUDA_CHUNK ? g.a.M - first : CUDA_CHUNK;
    for (int64_t j = threadIdx.x; j < g.a.N; j += THREADS) {
      const Column<T> c = column_of(g, b, j);
      const T v = log2(g.s.v[b * g.a.N + j]);
      for (int k = 0; k < rows; ++k) {
        const Row<T> row = row_of(g, pass, b, first + k);
        row.E[j] = T(LN2) * ((shifted_exponent(pass, row, j, *row.f, c) - *row.g) + (log2(*row.u) + v));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: the sequence, as one launch or as many
// ---------------------------------------------------------------------------------------------------------------------
enum class Phase {
  column_max, combine_max, exponentiate, combine_sum, sweep, sweep_and_complete, start_from_prior, take_log
};

template <typename T>
__device__ void do_phase(Phase phase, const Problems<T>& g, const Pass<T>& pass) {
  switch (phase) {
    case Phase::column_max: return column_max(g, pass);
    case Phase::combine_max: return combine<true>(g, pass);
    case Phase::exponentiate: return exponentiate(g, pass);
    case Phase::combine_sum: return combine<false>(g, pass);
    case Phase::sweep: return sweep(g, pass, false);
    case Phase::sweep_and_complete: return sweep(g, pass, true);
    case Phase::start_from_prior: return start_from_prior(g, pass);
    case Phase::take_log: return take_log(g, pass);
  }
}

template <typename T>
struct Passes {
  Pass<T> of[2];  // the prior's, where there is one, and the final one
};

// Calls run(phase, pass) for a whole assignment; s.f must be zero. (The pragma: run belongs to the host or the device.)
#pragma nv_exec_check_disable
template <typename T, typename Run>
HOST_DEVICE void each_phase(const AssignArgs<T>& a, const Passes<T>& passes, const Run& run) {
  for (int k = a.guided() ? 0 : 1; k < 2; ++k) {
    const Pass<T>& pass = passes.of[k];
    if (a.guided() && k == 1) run(Phase::start_from_prior, pass);
    for (int64_t round = 0; round < a.iters; ++round) {
      if (round % ROUNDS_PER_GROUP == 0) {
        run(Phase::column_max, pass);
        run(Phase::combine_max, pass);
        run(Phase::exponentiate, pass);
      }
      run(Phase::combine_sum, pass);  // prototypes
      const bool complete = round % ROUNDS_PER_GROUP == ROUNDS_PER_GROUP - 1 && round < a.iters - 1;
      run(complete ? Phase::sweep_and_complete : Phase::sweep, pass);  // samples
    }
  }
}

template <typename T>
struct PhaseThenBarrier {
  const Problems<T>& g;
  __device__ void operator()(Phase phase, const Pass<T>& pass) const {
    do_phase(phase, g, pass);
    cooperative_groups::this_grid().sync();
  }
};

template <typename T>  // 2 blocks a processor: 128 registers a thread, which is enough to spill none
__global__ void __launch_bounds__(THREADS, 2) one_launch(const __grid_constant__ Problems<T> g,
                                                         const __grid_constant__ Passes<T> passes) {
  each_phase(g.a, passes, PhaseThenBarrier<T>{g});
}

template <typename T>
__global__ void __launch_bounds__(THREADS) one_phase(Phase phase, const __grid_constant__ Problems<T> g,
                                                      const __grid_constant__ Pass<T> pass) {
  do_phase(phase, g, pass);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side
// ---------------------------------------------------------------------------------------------------------------------
struct Gpu {
  std::atomic<int64_t> l2_bytes{0}, blocks{0};  // blocks: that run at once, the most a barrier across the grid allows
};

// Queried once for each device and type.
template <typename T>
const Gpu& gpu() {
  static Gpu gpus[MAX_DEVICES];
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  Gpu& gpu = gpus[device % MAX_DEVICES];
  if (gpu.l2_bytes.load() == 0) {
    int l2 = 0, processors = 0, each = 0, cooperative = 0;
    check(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "L2 size");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cooperative launch");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, one_launch<T>, THREADS, PHASE_SHARED), "occupancy");
    gpu.blocks = cooperative ? int64_t(each) * processors : 0;
    gpu.l2_bytes = std::max(l2, 1);
  }
  return gpu;
}

template <typename T>
int64_t items(const Pass<T>& pass, const Problems<T>& g) {  // the most that a phase has, a block each
  const int64_t problems = pass.last - pass.first;
  return std::max(problems * g.s.chunks, (problems * g.a.N + WARP_SIZE - 1) / WARP_SIZE);
}

}  // namespace

template <typename T>
void solve(const AssignArgs<T>& a, const Solution<T>& s, cudaStream_t stream) {
  const int64_t B = a.views * a.crops, bytes = 2 * B * a.M * a.N * int64_t(sizeof(T));  // E and the scores
  check(cudaMemsetAsync(s.f, 0, B * a.M * sizeof(T), stream), "clearing f");
  const Gpu& device = gpu<T>();
  const Problems<T> g{a, s};
  const Passes<T> passes{prior_pass(a), final_pass(a)};
  if (device.blocks > 0 && bytes <= device.l2_bytes) {
    const int64_t blocks = std::min(std::max(items(passes.of[0], g), items(passes.of[1], g)), device.blocks.load());
    launch("one_launch", one_launch<T>, true, blocks, THREADS, PHASE_SHARED, stream, g, passes);
  } else {
    each_phase(a, passes, [&](Phase phase, const Pass<T>& pass) {
      launch("one_phase", one_phase<T>, false, items(pass, g), THREADS, PHASE_SHARED, stream, phase, g, pass);
    });
  }
}

template <typename T>
void log_assignment(const AssignArgs<T>& a, const Solution<T>& s, cudaStream_t stream) {
  const Problems<T> g{a, s};
  const auto of_pass = [&](const Pass<T>& pass) {
    launch("take_log", one_phase<T>, false, items(pass, g), THREADS, PHASE_SHARED, stream, Phase::take_log, g, pass);
  };
  of_pass(final_pass(a));
  if (a.one_leads()) of_pass(prior_pass(a));
}

#define INSTANTIATE(T)                                                            \
  template void solve<T>(const AssignArgs<T>&, const Solution<T>&, cudaStream_t); \
  template void log_assignment<T>(const AssignArgs<T>&, const Solution<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace goca::cuda

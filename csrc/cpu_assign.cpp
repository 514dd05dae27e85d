// The assignment on the CPU (Eqs. 5-10). The algorithm and why it is safe: goca.h.
//
// Work is split by problem and by chunk of 32 rows. A chunk writes its partial column maxima or sums to a row of its
// own, and chunks are added in their order, in double: results are the same bits for any number of threads. A sweep
// over E serves two half rounds: a row's sum gives u_i while the row is in the first-level cache, and at once u_i times
// the row is added to the next round's column sums. Three rounds so read E three times. Rows are taken four at a time,
// which shares the loads of v and of the column sums.
//
// Memory: E, and 1/32 of it for partial sums.
#include "cpu.h"

namespace goca::cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: what one chunk of rows does
// ---------------------------------------------------------------------------------------------------------------------
template <typename T>
struct Chunk {  // `rows` rows of one problem
  const T *S, *X;  // X: the T of goca.h, or nullptr
  int64_t S_row, X_row, rows, N;
  T p, q;
  T *E, *f, *g, *u;
  const T *v, *c, *late;
  T* partial;
};

// x_ij + shift; the products are added last, where the sum is small again.
template <bool PRIOR, typename T>
INLINE T exponent(const Chunk<T>& a, int64_t i, int64_t j, T shift) {
  return PRIOR ? a.p * a.S[i * a.S_row + j] + (a.q * a.X[i * a.X_row + j] + shift) : a.p * a.S[i * a.S_row + j] + shift;
}

// x_ij - c_j: the exponent of E before a row is rebuilt
template <bool PRIOR, typename T>
INLINE T shifted_exponent(const Chunk<T>& a, int64_t i, int64_t j) {
  return exponent<PRIOR>(a, i, j, a.f[i] - a.c[j]) - a.late[j];
}

template <typename T>
INLINE void prefetch_rows(const Chunk<T>& a, int64_t i, int64_t rows) {
  for (int64_t k = i; k < std::min(i + rows, a.rows); ++k) {
    prefetch(a.S + k * a.S_row, a.N);
    if (a.X) prefetch(a.X + k * a.X_row, a.N);
  }
}

// Each of the three passes over a chunk takes R rows at a time (four, then the rest one by one).
#define FOR_ROWS_OF_CHUNK(pass)                  \
  int64_t i = 0;                                 \
  for (; i + 4 <= a.rows; i += 4) pass<4>(a, i); \
  for (; i < a.rows; ++i) pass<1>(a, i);

// partial_j = max_i x_ij
template <int R, bool PRIOR, typename T>
INLINE void max_rows(const Chunk<T>& a, int64_t i) {
  T* partial = a.partial;
  SIMD for (int64_t j = 0; j < a.N; ++j) {
    T top = partial[j];
    for (int k = 0; k < R; ++k) top = maximum(exponent<PRIOR>(a, i + k, j, a.f[i + k]), top);
    partial[j] = top;
  }
}
template <int R, typename T>
INLINE void max_rows(const Chunk<T>& a, int64_t i) {
  prefetch_rows(a, i + R, R);
  a.X ? max_rows<R, true>(a, i) : max_rows<R, false>(a, i);
}
template <typename T>
INLINE void column_max_of(const Chunk<T>& a) {
  std::fill(a.partial, a.partial + a.N, -std::numeric_limits<T>::infinity());
  FOR_ROWS_OF_CHUNK(max_rows)
}
FOR_BOTH_TYPES(column_max, Chunk)

// E_ij = exp2(x_ij - c_j), partial_j = sum_i E_ij, g_i = 0
template <int R, bool PRIOR, typename T>
INLINE void exponentiate_rows(const Chunk<T>& a, int64_t i) {
  T *partial = a.partial, *E = a.E + i * a.N;
  std::fill(a.g + i, a.g + i + R, T(0));
  SIMD for (int64_t j = 0; j < a.N; ++j) {
    T sum = 0;
    for (int k = 0; k < R; ++k) sum += E[k * a.N + j] = exp2_fast(shifted_exponent<PRIOR>(a, i + k, j));
    partial[j] += sum;
  }
}
template <int R, typename T>
INLINE void exponentiate_rows(const Chunk<T>& a, int64_t i) {
  prefetch_rows(a, i + R, R);
  a.X ? exponentiate_rows<R, true>(a, i) : exponentiate_rows<R, false>(a, i);
}
template <typename T>
INLINE void exponentiate_of(const Chunk<T>& a) {
  std::fill(a.partial, a.partial + a.N, T(0));
  FOR_ROWS_OF_CHUNK(exponentiate_rows)
}
FOR_BOTH_TYPES(exponentiate, Chunk)

// A row that vanishes beside the others: once more, with its own maximum taken off, and its sum with v.
template <bool PRIOR, typename T>
INLINE T rebuild_row(const Chunk<T>& a, int64_t i) {
  T* E = a.E + i * a.N;
  T top = -std::numeric_limits<T>::infinity(), sum = 0;
  SIMD_MAX(top) for (int64_t j = 0; j < a.N; ++j) top = maximum(shifted_exponent<PRIOR>(a, i, j), top);
  a.g[i] = top;
  SIMD_SUM(sum) for (int64_t j = 0; j < a.N; ++j) {
    const T e = exp2_fast(shifted_exponent<PRIOR>(a, i, j) - top);
    E[j] = e;
    sum += e * a.v[j];
  }
  return sum;
}

// u_i = 1 / sum_j E_ij v_j; partial_j = sum_i u_i E_ij
template <int R, typename T>
INLINE void sweep_rows(const Chunk<T>& a, int64_t i) {
  const int64_t N = a.N;
  const T *E = a.E + i * N, *v = a.v;
  for (int64_t k = R; k < std::min<int64_t>(2 * R, a.rows - i); ++k) prefetch(E + k * N, N);
  T u[R];
  if constexpr (R == 4) {
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    SIMD_SUM(s0, s1, s2, s3) for (int64_t j = 0; j < N; ++j) {
      s0 += E[j] * v[j];
      s1 += E[N + j] * v[j];
      s2 += E[2 * N + j] * v[j];
      s3 += E[3 * N + j] * v[j];
    }
    u[0] = s0, u[1] = s1, u[2] = s2, u[3] = s3;
  } else {
    T s = 0;
    SIMD_SUM(s) for (int64_t j = 0; j < N; ++j) s += E[j] * v[j];
    u[0] = s;
  }
  for (int k = 0; k < R; ++k) {
    if (u[k] < T(REBUILD_BELOW)) u[k] = a.X ? rebuild_row<true>(a, i + k) : rebuild_row<false>(a, i + k);
    a.u[i + k] = u[k] = 1 / u[k];
  }
  T* partial = a.partial;
  SIMD for (int64_t j = 0; j < N; ++j) {
    T sum = 0;
    for (int k = 0; k < R; ++k) sum += u[k] * E[k * N + j];
    partial[j] += sum;
  }
}
template <typename T>
INLINE void sweep_of(const Chunk<T>& a) {
  std::fill(a.partial, a.partial + a.N, T(0));
  FOR_ROWS_OF_CHUNK(sweep_rows)
}
FOR_BOTH_TYPES(sweep, Chunk)

// E_ij = log D_ij = ln 2 (x_ij - c_j - g_i + log2 u_i + log2 v_j), u and v holding their logarithms
template <bool PRIOR, typename T>
INLINE void log_row(const Chunk<T>& a, int64_t i) {
  T* E = a.E + i * a.N;
  const T g = a.g[i], u = a.u[i];
  SIMD for (int64_t j = 0; j < a.N; ++j) E[j] = T(LN2) * ((shifted_exponent<PRIOR>(a, i, j) - g) + (u + a.v[j]));
}
template <typename T>
INLINE void take_log_of(const Chunk<T>& a) {
  for (int64_t i = 0; i < a.rows; ++i) a.X ? log_row<true>(a, i) : log_row<false>(a, i);
}
FOR_BOTH_TYPES(take_log, Chunk)

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: the rounds
// ---------------------------------------------------------------------------------------------------------------------
template <typename T>
struct Solver : Problems<T> {  // of the problems of one pass
  Pass<T> pass;
};

template <typename T>
Chunk<T> chunk_of(const Solver<T>& solver, int64_t item) {  // item = b * chunks + k
  const auto& [a, s] = static_cast<const Problems<T>&>(solver);
  const int64_t b = item / s.chunks, i = item % s.chunks * s.chunk, row = b * a.M + i;
  const Pass<T>& pass = solver.pass;
  return {solver.scores(b, i), pass.prior ? solver.prior(b, i) : nullptr, a.scores.row,
          a.guided() ? a.scores.row : a.log_prior.row, std::min(s.chunk, a.M - i), a.N, pass.p, pass.q,
          s.E + row * a.N, s.f + row, s.g + row, s.u + row, s.v + b * a.N, s.c + b * a.N, s.late + b * a.N,
          s.partial + item * a.N};
}

template <typename T, typename F>
void for_each_chunk(const Solver<T>& solver, int64_t first, int64_t last, const F& f) {
  const int64_t n = solver.s.chunks, entries = solver.s.chunk * solver.a.N;
  const int64_t grain = std::max<int64_t>(1, MIN_ENTRIES_PER_THREAD / entries);
  at::parallel_for(first * n, last * n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) f(chunk_of(solver, item));
  });
}

// f_i with what the rounds since it was last complete have made of row i
template <typename T>
T row_potential(const Solution<T>& s, int64_t i) {
  return s.f[i] + (std::log2(s.u[i]) - s.g[i]);
}

// The rounds of problems first .. last; s.f holds the row potentials to start from.
template <typename T>
void rounds(const Solver<T>& solver, int64_t first, int64_t last) {
  const auto& a = solver.a;
  const auto& s = solver.s;
  const int64_t n_chunks = s.chunks, N = a.N;
  const auto combine = [&, n_chunks, N](auto start, auto join, auto finish) {
    at::parallel_for(first * N, last * N, MIN_ENTRIES_PER_THREAD, [&](int64_t begin, int64_t end) {
      for (int64_t bj = begin; bj < end; ++bj) {
        const T* column = s.partial + (bj / N) * n_chunks * N + bj % N;
        auto x = start;
        for (int64_t k = 0; k < n_chunks; ++k) x = join(x, column[k * N]);
        finish(bj, x);
      }
    });
  };
  const auto maxima = [&] {
    combine(-std::numeric_limits<T>::infinity(), [](T x, T y) { return maximum(y, x); }, [&](int64_t bj, T x) {
      const bool early = std::abs(x) < EARLY_LIMIT<T>;
      s.c[bj] = early ? x : 0;
      s.late[bj] = early ? 0 : x;
    });
  };
  const auto inverse_sums = [&] {
    combine(0., [](double x, T y) { return x + y; }, [&](int64_t bj, double x) { s.v[bj] = T(1 / x); });
  };
  for (int64_t round = 0; round < a.iters; ++round) {
    if (round % ROUNDS_PER_GROUP == 0) {
      for_each_chunk(solver, first, last, [](const Chunk<T>& c) { column_max(c); });
      maxima();
      for_each_chunk(solver, first, last, [](const Chunk<T>& c) { exponentiate(c); });
    }
    inverse_sums();  // prototypes
    for_each_chunk(solver, first, last, [](const Chunk<T>& c) { sweep(c); });  // samples
    if (round % ROUNDS_PER_GROUP == ROUNDS_PER_GROUP - 1 && round < a.iters - 1) {
      for (int64_t i = first * a.M; i < last * a.M; ++i) s.f[i] = row_potential(s, i);
    }
  }
}

template <typename T>
void run(const Solver<T>& solver) {
  const int64_t first = solver.pass.first, last = solver.pass.last, B = last - first, threads = at::get_num_threads();
  if (B % threads == 0 || B >= 4 * threads) {  // whole problems a thread: no barriers, and the loops within stay serial
    const int64_t grain = std::max<int64_t>(1, MIN_ENTRIES_PER_THREAD / (solver.a.M * solver.a.N));
    at::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) rounds(solver, b, b + 1);
    });
  } else {
    rounds(solver, first, last);
  }
}

// Eqs. 6, 7: a view with a prior starts from r times the other's row potential.
template <typename T>
void start_from_prior(const AssignArgs<T>& a, const Solution<T>& s, T r) {
  const int64_t half = a.crops * a.M;
  for (int64_t i = 0; i < half; ++i) {
    const T of_rgb = a.prior_views[1] ? row_potential(s, i) : T(0);
    if (a.prior_views[0]) s.f[i] = r * row_potential(s, half + i);
    if (a.prior_views[1]) s.f[half + i] = r * of_rgb;
  }
}

}  // namespace

template <typename T>
void solve(const AssignArgs<T>& a, const Solution<T>& s) {
  const Solver<T> final{{a, s}, final_pass(a)};
  std::fill(s.f, s.f + final.count() * a.M, T(0));
  if (a.guided()) {
    run<T>({{a, s}, prior_pass(a)});
    start_from_prior(a, s, final.pass.r);
  }
  run(final);
}

template <typename T>
void log_assignment(const AssignArgs<T>& a, const Solution<T>& s) {
  const int64_t B = a.views * a.crops;
  for (int64_t bi = 0; bi < B * a.M; ++bi) s.u[bi] = std::log2(s.u[bi]);
  for (int64_t bj = 0; bj < B * a.N; ++bj) s.v[bj] = std::log2(s.v[bj]);
  const auto of_pass = [&](const Pass<T>& pass) {
    for_each_chunk<T>({{a, s}, pass}, pass.first, pass.last, [](const Chunk<T>& c) { take_log(c); });
  };
  of_pass(final_pass(a));
  if (a.one_leads()) of_pass(prior_pass(a));
}

#define INSTANTIATE(T)                                              \
  template void solve<T>(const AssignArgs<T>&, const Solution<T>&); \
  template void log_assignment<T>(const AssignArgs<T>&, const Solution<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace goca::cpu

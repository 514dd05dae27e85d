// The operator on the CPU (Eqs. 5-10, 12-13). The algorithm and why it is safe: goca.h.
//
// Work is split by problem and by chunk of 32 rows. A chunk writes its partial column maxima or sums to a row of its
// own, and chunks are added in their order, in double: results are the same bits for any number of threads. A sweep
// over E serves two half rounds: a row's sum gives u_i while the row is in the first-level cache, and at once u_i times
// the row is added to the next round's column sums. Three rounds so read E three times. Rows are taken four at a time,
// which shares the loads of v and of the column sums.
//
// Vectors. The functions marked CLONES are compiled for AVX-512, AVX2 and the base machine, and the loader picks one
// when the program starts; their loops are written for the compiler to vectorise (-fopenmp-simd). Sums over a row run
// in vector lanes, so machines with other vectors round differently, within the tests' tolerance (1e-5 on D in
// float32).
//
// Memory: E, and 1/32 of it for partial sums; the loss needs A + 2 rows of N a thread.
#include "goca.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
#define PRAGMA(text) _Pragma(#text)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define SIMD_MAX(x) PRAGMA(omp simd reduction(max : x))

// One name for float and double: a template does the work, two functions carry the clones.
#define FOR_BOTH_TYPES(name, Args)                              \
  CLONES void name(const Args<float>& a) { name##_of(a); }      \
  CLONES void name(const Args<double>& a) { name##_of(a); }

namespace goca::cpu {
namespace {

constexpr int64_t WORK = 32768;  // entries below which another thread costs more than it brings

// exp2(t) for t <= 127: 2^n by its bits, 2^r on |r| <= 1/2 by a minimax polynomial (relative error 2e-9 and 3e-18,
// below the rounding of float and double). Adding 1.5 * 2^mantissa rounds t to n and leaves n in the low bits. Below
// the smallest normal number the result is 0. NaN stays NaN.
INLINE float exp2_fast(float t) {
  const float low = t < -127.f ? -127.f : t, shifted = low + 12582912.f;
  const float r = low - (shifted - 12582912.f);
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  float y = 0.000153458121587f;
  y = y * r + 0.00133999312095f;
  y = y * r + 0.00961848895652f;
  y = y * r + 0.05550328777f;
  y = y * r + 0.240226468906f;
  y = y * r + 0.693147205737f;
  y = y * r + 1.f;
  return y * power;
}

INLINE double exp2_fast(double t) {
  const double low = t < -1023. ? -1023. : t, shifted = low + 6755399441055744.;
  const double r = low - (shifted - 6755399441055744.);
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits - 0x4338000000000000LL + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  double y = 4.4352809446103361611e-10;
  y = y * r + 7.0741056262456593708e-9;
  y = y * r + 1.0178198033328527662e-7;
  y = y * r + 1.3215433089594629037e-6;
  y = y * r + 0.0000152527334899608046;
  y = y * r + 0.00015403530462514613026;
  y = y * r + 0.0013333558146789950323;
  y = y * r + 0.0096181291075883350833;
  y = y * r + 0.055504108664819921483;
  y = y * r + 0.24022650695910156205;
  y = y * r + 0.69314718055994533046;
  y = y * r + 1.;
  return y * power;
}

template <typename T>
INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
INLINE T smaller(T a, T b) {
  return a > b ? b : a;
}

// Ask for a row before its turn: machines fetch ahead within a page of 4 KB, and a row of 1000 floats is one page.
template <typename T>
INLINE void fetch(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j);
}

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: what one chunk of rows does
// ---------------------------------------------------------------------------------------------------------------------
template <typename T>
struct Chunk {  // `rows` rows of one problem
  const T *S, *X;  // X: the T of goca.h, or nullptr
  int64_t S_row, X_row, rows, N;
  T p, q;
  T *E, *f, *u;
  const T *v, *c;
  T* partial;
};

// x_ij + shift; the products are added last, where the sum is small again.
template <bool PRIOR, typename T>
INLINE T exponent(const Chunk<T>& a, int64_t i, int64_t j, T shift) {
  return PRIOR ? a.p * a.S[i * a.S_row + j] + (a.q * a.X[i * a.X_row + j] + shift) : a.p * a.S[i * a.S_row + j] + shift;
}

template <typename T>
INLINE void fetch_rows(const Chunk<T>& a, int64_t i, int64_t rows) {
  for (int64_t k = i; k < std::min(i + rows, a.rows); ++k) {
    fetch(a.S + k * a.S_row, a.N);
    if (a.X) fetch(a.X + k * a.X_row, a.N);
  }
}

// Each of the three passes over a chunk takes R rows at a time (four, then the rest one by one).
#define ROWS_OF_CHUNK(pass)                           \
  int64_t i = 0;                                      \
  for (; i + 4 <= a.rows; i += 4) pass<4>(a, i);      \
  for (; i < a.rows; ++i) pass<1>(a, i);

// partial_j = max_i x_ij
template <int R, bool PRIOR, typename T>
INLINE void max_rows(const Chunk<T>& a, int64_t i) {
  T* partial = a.partial;
  SIMD for (int64_t j = 0; j < a.N; ++j) {
    T top = partial[j];
    for (int k = 0; k < R; ++k) top = larger(exponent<PRIOR>(a, i + k, j, a.f[i + k]), top);
    partial[j] = top;
  }
}
template <int R, typename T>
INLINE void max_rows(const Chunk<T>& a, int64_t i) {
  fetch_rows(a, i + R, R);
  a.X ? max_rows<R, true>(a, i) : max_rows<R, false>(a, i);
}
template <typename T>
INLINE void column_max_of(const Chunk<T>& a) {
  std::fill(a.partial, a.partial + a.N, -std::numeric_limits<T>::infinity());
  ROWS_OF_CHUNK(max_rows)
}
FOR_BOTH_TYPES(column_max, Chunk)

// E_ij = exp2(x_ij - c_j), partial_j = sum_i E_ij
template <int R, bool PRIOR, typename T>
INLINE void exponentiate_rows(const Chunk<T>& a, int64_t i) {
  T *partial = a.partial, *E = a.E + i * a.N;
  SIMD for (int64_t j = 0; j < a.N; ++j) {
    T sum = 0;
    for (int k = 0; k < R; ++k) sum += E[k * a.N + j] = exp2_fast(exponent<PRIOR>(a, i + k, j, a.f[i + k] - a.c[j]));
    partial[j] += sum;
  }
}
template <int R, typename T>
INLINE void exponentiate_rows(const Chunk<T>& a, int64_t i) {
  fetch_rows(a, i + R, R);
  a.X ? exponentiate_rows<R, true>(a, i) : exponentiate_rows<R, false>(a, i);
}
template <typename T>
INLINE void exponentiate_of(const Chunk<T>& a) {
  std::fill(a.partial, a.partial + a.N, T(0));
  ROWS_OF_CHUNK(exponentiate_rows)
}
FOR_BOTH_TYPES(exponentiate, Chunk)

// A row that vanishes beside the others: once more, with its own maximum taken off, and its sum with v.
template <bool PRIOR, typename T>
INLINE T rebuilt_row(const Chunk<T>& a, int64_t i) {
  T* E = a.E + i * a.N;
  T top = -std::numeric_limits<T>::infinity(), sum = 0;
  SIMD_MAX(top) for (int64_t j = 0; j < a.N; ++j) top = larger(exponent<PRIOR>(a, i, j, a.f[i] - a.c[j]), top);
  const T f = a.f[i] -= top;
  SIMD_SUM(sum) for (int64_t j = 0; j < a.N; ++j) {
    const T e = exp2_fast(exponent<PRIOR>(a, i, j, f - a.c[j]));
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
  for (int64_t k = R; k < std::min<int64_t>(2 * R, a.rows - i); ++k) fetch(E + k * N, N);
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
    if (u[k] < T(REBUILD)) u[k] = a.X ? rebuilt_row<true>(a, i + k) : rebuilt_row<false>(a, i + k);
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
  ROWS_OF_CHUNK(sweep_rows)
}
FOR_BOTH_TYPES(sweep, Chunk)

// E_ij = log D_ij = ln 2 (x_ij - c_j + log2 v_j), the row potential f_i complete and c_j holding c_j - log2 v_j
template <typename T>
INLINE void take_log_of(const Chunk<T>& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    T* E = a.E + i * a.N;
    if (a.X) {
      SIMD for (int64_t j = 0; j < a.N; ++j) E[j] = T(LN2) * exponent<true>(a, i, j, a.f[i] - a.c[j]);
    } else {
      SIMD for (int64_t j = 0; j < a.N; ++j) E[j] = T(LN2) * exponent<false>(a, i, j, a.f[i] - a.c[j]);
    }
  }
}
FOR_BOTH_TYPES(take_log, Chunk)

// ---------------------------------------------------------------------------------------------------------------------
// Assignment: the rounds
// ---------------------------------------------------------------------------------------------------------------------
template <typename T>
struct Stage : Problems<T> {  // and the exponent's weights in this pass
  Weights<T> w;
};

template <typename T>
Chunk<T> chunk_of(const Stage<T>& stage, int64_t item) {  // item = b * chunks + k
  const auto& [a, s] = static_cast<const Problems<T>&>(stage);
  const int64_t b = item / s.chunks, i = item % s.chunks * s.chunk, row = b * a.M + i;
  return {stage.scores(b, i), stage.w.prior ? stage.prior(b, i) : nullptr, a.scores.row,
          a.guided ? a.scores.row : a.log_prior.row, std::min(s.chunk, a.M - i), a.N, stage.w.p, stage.w.q,
          s.E + row * a.N, s.f + row, s.u + row, s.v + b * a.N, s.c + b * a.N, s.partial + item * a.N};
}

template <typename T, typename F>
void for_each_chunk(const Stage<T>& stage, int64_t first, int64_t last, const F& f) {
  const int64_t n = stage.s.chunks, grain = std::max<int64_t>(1, WORK / (stage.s.chunk * stage.a.N));
  at::parallel_for(first * n, last * n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) f(chunk_of(stage, item));
  });
}

// The rounds of problems first .. last; s.f holds the row potentials to start from.
template <typename T>
void rounds(const Stage<T>& stage, int64_t first, int64_t last) {
  const auto& a = stage.a;
  const auto& s = stage.s;
  const int64_t n_chunks = s.chunks, N = a.N;
  const auto combine = [&, n_chunks, N](T* out, auto start, auto join, auto finish) {
    at::parallel_for(first * N, last * N, WORK, [&](int64_t begin, int64_t end) {
      for (int64_t bj = begin; bj < end; ++bj) {
        const T* column = s.partial + (bj / N) * n_chunks * N + bj % N;
        auto x = start;
        for (int64_t k = 0; k < n_chunks; ++k) x = join(x, column[k * N]);
        out[bj] = finish(x);
      }
    });
  };
  const auto maxima = [&] {
    combine(s.c, -std::numeric_limits<T>::infinity(), [](T x, T y) { return larger(y, x); }, [](T x) { return x; });
  };
  const auto inverse_sums = [&] {
    combine(s.v, 0., [](double x, T y) { return x + y; }, [](double x) { return T(1 / x); });
  };
  for (int64_t round = 0; round < a.iters; ++round) {
    if (round % GROUP == 0) {
      for_each_chunk(stage, first, last, [](const Chunk<T>& c) { column_max(c); });
      maxima();
      for_each_chunk(stage, first, last, [](const Chunk<T>& c) { exponentiate(c); });
    }
    inverse_sums();  // prototypes
    for_each_chunk(stage, first, last, [](const Chunk<T>& c) { sweep(c); });  // samples
    if (round % GROUP == GROUP - 1 || round == a.iters - 1) {
      for (int64_t i = first * a.M; i < last * a.M; ++i) s.f[i] += std::log2(s.u[i]);
    }
  }
}

template <typename T>
void run_stage(const Stage<T>& stage) {
  const int64_t B = stage.count(), threads = at::get_num_threads();
  if (B % threads == 0 || B >= 4 * threads) {  // whole problems a thread: no barriers, and the loops within stay serial
    const int64_t grain = std::max<int64_t>(1, WORK / (stage.a.M * stage.a.N));
    at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) rounds(stage, b, b + 1);
    });
  } else {
    rounds(stage, 0, B);
  }
}

}  // namespace

template <typename T>
void solve(const AssignArgs<T>& a, const Solved<T>& s) {
  const Stage<T> stage{{a, s}, final_weights(a)};
  std::fill(s.f, s.f + stage.count() * a.M, T(0));
  if (a.guided) {
    run_stage<T>({{a, s}, unguided(a)});  // Eq. 5: D' of both views
    T *rgb = s.f, *flow = s.f + a.crops * a.M;
    for (int64_t i = 0; i < a.crops * a.M; ++i) {  // Eqs. 6, 7: each view starts from the other's row potential
      const T other = flow[i];
      flow[i] = stage.w.r * rgb[i];
      rgb[i] = stage.w.r * other;
    }
  }
  run_stage(stage);
}

template <typename T>
void log_assignment(const AssignArgs<T>& a, const Solved<T>& s) {
  const Stage<T> stage{{a, s}, final_weights(a)};
  for (int64_t bj = 0; bj < stage.count() * a.N; ++bj) s.c[bj] -= std::log2(s.v[bj]);
  for_each_chunk(stage, 0, stage.count(), [](const Chunk<T>& c) { take_log(c); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Loss and gradient (Eqs. 2, 12, 13): one sample of one view
// ---------------------------------------------------------------------------------------------------------------------
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
      SIMD for (int64_t j = 0; j < N; ++j) total[j] += d[j] = exp2_fast(smaller(T(LOG2E) * log_d[j], T(128)));
    } else {
      const T *E = a.E + k * a.E_stride, *v = a.v + k * a.v_stride, u = a.u[k * a.u_stride];
      fetch(k + 1 < A ? E + a.E_stride : a.scores, N);
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
    if (crop + 1 < a.crops) fetch(S + a.crop_stride, N);
    T top = -std::numeric_limits<T>::infinity();
    const int64_t quarter = N / 4;  // a tree of comparisons waits less for itself than a chain
    SIMD_MAX(top) for (int64_t j = 0; j < quarter; ++j) {
      const T a0 = larger(S[j], S[quarter + j]), a1 = larger(S[2 * quarter + j], S[3 * quarter + j]);
      top = larger(larger(a0, a1), top);
    }
    for (int64_t j = 4 * quarter; j < N; ++j) top = larger(S[j], top);
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
  const int64_t grain = std::max<int64_t>(1, WORK / (a.crops * N));
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
        x.E = a.solved.E + row * N, x.u = a.solved.u + row, x.v = a.solved.v + b * N;
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

#define INSTANTIATE(T)                                                  \
  template void solve<T>(const AssignArgs<T>&, const Solved<T>&);       \
  template void log_assignment<T>(const AssignArgs<T>&, const Solved<T>&); \
  template void swapped_loss<T>(const LossArgs<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace goca::cpu

// Arguments of the kernels (cpu_assign.cpp, cpu_loss.cpp, cuda_assign.cu, cuda_loss.cu): pointers, sizes and numbers,
// nothing of torch.
//
// Both devices run the same algorithm. Everything lives in base 2, where exp2 is cheapest. One problem is one crop of
// one view, its logarithm of K (Eq. 10)
//
//     x_ij = p S_ij + q T_ij + f_i        T: the prior's logarithm, or the other view's scores; or absent
//
// and rounds are done in groups of up to ROUNDS_PER_GROUP = 3:
//
//   first round, log domain   c_j = max_i x_ij;  E_ij = exp2(x_ij - c_j);  g_i = 0
//                             v_j = 1 / sum_i E_ij;      u_i = 1 / sum_j E_ij v_j
//   next two, by products     v_j = 1 / sum_i u_i E_ij;  u_i = 1 / sum_j E_ij v_j
//   then                      f_i += log2 u_i - g_i, and the next group starts from S again, exact in the log domain
//
// so that D_ij = u_i E_ij v_j and log2 D_ij = (x_ij - c_j - g_i) + log2 u_i + log2 v_j, without the logarithm of a
// rounded D, and with the very exponent that E was made of: rows sum to 1 whatever the size of x. One exponential an
// entry and group; three rounds are one group.
//
// Why nothing under- or overflows. Each column of E has an entry 1, so sum_i E_ij lies in [1, M] and v_j in [1/M, 1]. A
// sample far from every prototype has a tiny row; where sum_j E_ij v_j < REBUILD_BELOW, its row is rebuilt with the
// row's own maximum g_i taken off too: then its sum lies in [1/M, N]. So after the first round u_i <= 1/REBUILD_BELOW,
// and what was flushed to zero (below 1e-38 in float32) held less than 1e-26 of its row. A_ij = u_i E_ij v_j: its rows
// sum to 1. Every column has an i with E_ij v_j >= 1/M, and u_i >= 1/N, so each column of A sums to a number in
// [1/(MN), M]: the second round's factors lie there too. By then columns sum to 1, each entry is at most 1, rows sum to
// [1/M, N], and the columns after that to [1/N, M]. Two rounds of products can so lift a flushed entry by no more than
// (MN)^2: 1e-12 of its row at M = N = 3000. A third would add another MN; therefore groups.
//
// Where x is large, c_j is a rounded number, and x_ij - c_j, exact as fused operations are, is half its last place away
// from 0 at the column's maximum. That cancels with v_j, unless it is a power of two that E can't hold: from
// EARLY_LIMIT on c_j is taken off last, from x_ij rounded as it was when the maximum was found (`late`; else 0).
//
// Why the row factor counts. A factor on a column of K vanishes in the first half round. A factor on a row does not
// within a few rounds (the trap of a maximum a sample): so the prior enters with its row potential f' but without its
// column one, log2 D'_ij = S'_ij / (lambda1 ln 2) + f'_i + g'_j.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

namespace goca {

constexpr int ROUNDS_PER_GROUP = 3;  // from one visit to the log domain to the next
template <typename T>
constexpr T EARLY_LIMIT = sizeof(T) == 4 ? T(1 << 27) : T(int64_t(1) << 56);  // half its last place: 8
constexpr double REBUILD_BELOW = 1e-12, LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// A stack of matrices [views, crops, rows, N], the last dimension contiguous; strides in elements.
template <typename T>
struct Matrices {
  const T* data = nullptr;
  int64_t view = 0, crop = 0, row = 0;
};

template <typename T>
struct AssignArgs {
  int64_t views, crops, M, N;  // problem b = view * crops + crop
  Matrices<T> scores;
  Matrices<T> log_prior;  // data == nullptr: none
  bool prior_views[2];    // whether rgb, and whether flow, takes the other's unguided assignment as its prior
  double lambda1, lambda2;
  int prior_sign;
  int64_t iters;

  HOST_DEVICE bool guided() const { return prior_views[0] || prior_views[1]; }  // views == 2 then
  HOST_DEVICE bool one_leads() const { return prior_views[0] != prior_views[1]; }
};

// Where an assignment lies after the last round: D_ij = u_i E_ij v_j.
template <typename T>
struct Solution {
  T* E;           // [B, M, N]
  T* f;           // [B, M] log2 of the row's factor in x
  T* g;           // [B, M]
  T* u;           // [B, M]
  T* v;           // [B, N]
  T* c;           // [B, N] the column maximum, or 0 where that is large and stands in
  T* late;        // [B, N]
  T* partial;     // [B, chunks, N] a partial column maximum or sum for each chunk of rows
  int64_t chunk;  // rows of one; fixed by the device, so that sums never depend on who computes them
  int64_t chunks;
};

constexpr int64_t CPU_CHUNK = 32, CUDA_CHUNK = 8;

inline int64_t potentials_size(int64_t B, int64_t M, int64_t N, int64_t chunk) {  // all but E
  return B * (3 * M + 3 * N + (M + chunk - 1) / chunk * N);
}

template <typename T>
Solution<T> partition(T* E, T* rest, int64_t B, int64_t M, int64_t N, int64_t chunk) {
  T *g = rest + B * M, *u = g + B * M, *v = u + B * M, *c = v + B * N, *late = c + B * N;
  return {E, rest, g, u, v, c, late, late + B * N, chunk, (M + chunk - 1) / chunk};
}

template <typename T>
struct Problems {
  AssignArgs<T> a;
  Solution<T> s;

  HOST_DEVICE int64_t count() const { return a.views * a.crops; }
  HOST_DEVICE const T* scores(int64_t b, int64_t i) const {
    return a.scores.data + b / a.crops * a.scores.view + b % a.crops * a.scores.crop + i * a.scores.row;
  }
  HOST_DEVICE const T* prior(int64_t b, int64_t i) const {  // T_i of problem b; meaningful where there is a prior
    const Matrices<T>& x = a.guided() ? a.scores : a.log_prior;
    const int64_t view = a.guided() ? 1 - b / a.crops : b / a.crops;
    return x.data + view * x.view + b % a.crops * x.crop + i * x.row;
  }
};

// One pass of the rounds over problems first .. last, with the exponent's weights (Eq. 5, or Eq. 10 with a prior) in
// base 2:
//   x_ij = p S_ij + q T_ij + f_i,   f_i starting at r f'_i, f' the prior's row potential
template <typename T>
struct Pass {
  int64_t first, last;
  bool prior;
  T p, q, r;
};

// Eq. 5 for each view that is the other's prior. Where one leads it is the leader alone: its final assignment, too.
template <typename T>
HOST_DEVICE Pass<T> prior_pass(const AssignArgs<T>& a) {
  return {a.prior_views[1] ? 0 : a.crops, a.prior_views[0] ? 2 * a.crops : a.crops, false, T(LOG2E / a.lambda1), 0, 0};
}

// Eqs. 6, 7 for each view with a prior; where no view guides another, every view.
template <typename T>
HOST_DEVICE Pass<T> final_pass(const AssignArgs<T>& a) {
  if (!a.guided() && !a.log_prior.data) return {0, a.views * a.crops, false, T(LOG2E / a.lambda1), 0, 0};
  const double w = 1 / (a.lambda1 + a.lambda2), q = w * a.prior_sign * a.lambda2;
  if (!a.guided()) return {0, a.views * a.crops, true, T(w * LOG2E), T(q * LOG2E), T(q)};
  return {a.prior_views[0] ? 0 : a.crops, a.prior_views[1] ? 2 * a.crops : a.crops, true, T(w * LOG2E),
          T(q * LOG2E / a.lambda1), T(q)};
}

template <typename T>
struct LossArgs {
  int64_t views, crops, assigning, m, N;
  Matrices<T> scores;
  double inverse_temperature;
  double weight;         // of one cross entropy: 1 / (samples x pairs of crops)
  Matrices<T> log_targets;  // either these, [views, assigning, m, N] (data != nullptr),
  Solution<T> solution;    // or an assignment of M rows, of which first_row .. first_row + m are meant
  int64_t M, first_row;
  T* loss;        // scalar
  T* gradient;    // [views, crops, m, N] contiguous, or nullptr
  double* terms;  // [views * m] scratch: one sample's part of the loss
};

namespace cpu {
template <typename T> void solve(const AssignArgs<T>&, const Solution<T>&);
template <typename T> void log_assignment(const AssignArgs<T>&, const Solution<T>&);  // E becomes log D
template <typename T> void swapped_loss(const LossArgs<T>&);
}  // namespace cpu

}  // namespace goca

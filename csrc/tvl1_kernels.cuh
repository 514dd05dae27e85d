// The kernels of tvl1_cuda.cu. A block owns a tile of a pair (or of an image or a component of u), a thread a pixel.
// The operations are those of tvl1_cpu.cpp, kept from contraction by mul and add, so that a GPU's flow has the CPU's
// bits.
//
// An iteration is one launch: a block makes the new u of its tile, and of one row and column more, in shared memory,
// then the new p; old and new planes take turns, since neighbours read the old ones. Which of two planes holds a pair's
// u, or its p, is a bit each. The last of a pair's blocks to end adds the tiles' squared changes, in double and in a
// fixed order, and decides whether the pair goes on; blocks of a pair that doesn't return at once.
//
// A pixel-iteration moves 60 bytes: u and p in and out, three planes of data in. Two iterations a launch would move
// half, but those behind a pair's stop would have to be undone and done again. Doubles are used where floats can't
// decide (`length`) and by one warp of eight, since most cards do 1 of them for 32 or 64 floats.
#pragma once
#include "tvl1_cuda.h"

#include <cmath>
#include <utility>

namespace goca::tvl1::cuda {
namespace {

constexpr int THREADS = 256, WARP_SIZE = 32, TILE_W = 32, TILE_H = THREADS / TILE_W;
constexpr int SHARED_W = TILE_W + 1, SHARED_PIXELS = SHARED_W * (TILE_H + 1);
constexpr int RADIUS = 2, SORTED_W = TILE_W + 2 * RADIUS, SORTED = SORTED_W * TILE_H;  // of the median
constexpr unsigned FULL_WARP_MASK = 0xffffffff;

#ifdef GOCA_EMULATED
template <typename T>
T mul(T a, T b) { return a * b; }
template <typename T>
T add(T a, T b) { return a + b; }
#else
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ double tvl1_bytes[];
  return reinterpret_cast<T*>(tvl1_bytes);
}
__device__ inline float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }
#endif

struct Level {
  int64_t pairs;
  int h, w, tiles_x, tiles_y;
  float *images;        // [pairs, 2, h, w]: I0, I1
  float *u[2], *p[2];   // [pairs, 2, h, w], [pairs, 4, h, w]: by x and y of u, by x and y of v
  float* data;          // [pairs, 3, h, w]: Ix, Iy, constant part of rho
  float* textures;      // [pairs, h + 2 BORDER, w + 2 BORDER, 4]: I1, d/dx, d/dy, 0
  double* change;       // [pairs, tiles]
  Control* control;     // [pairs]
  float limit, theta, dual_step, negligible;
  double stop;

  __host__ __device__ int n() const { return h * w; }
  __host__ __device__ int tiles() const { return tiles_x * tiles_y; }
};

// The pairs that are launched; blockIdx.z counts them.
struct Pairs {
  uint8_t at[BATCH];
};

struct Pixel {
  int x, y;
};
__device__ inline Pixel pixel_of_thread() {
  return {int(blockIdx.x) * TILE_W + int(threadIdx.x) % TILE_W, int(blockIdx.y) * TILE_H + int(threadIdx.x) / TILE_W};
}

// One of two planes: by a choice, since an index would put the arguments into local memory.
__device__ inline float* select(float* const* planes, int which) { return which ? planes[1] : planes[0]; }

__device__ inline int clamp_index(int i, int n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Images: bytes to floats, bilinear resizing, central differences, bicubic warps
// ---------------------------------------------------------------------------------------------------------------------
__global__ void load(Args a, int64_t first, Level l) {  // blockIdx.z: image
  const auto [x, y] = pixel_of_thread();
  if (x >= l.w || y >= l.h) return;
  const int64_t pair = first + blockIdx.z / 2, frame = pair / (a.frames - 1) * a.frames + pair % (a.frames - 1);
  const int64_t from = (frame + blockIdx.z % 2) * l.n() + y * l.w + x;
  l.images[int64_t(blockIdx.z) * l.n() + y * l.w + x] = a.bytes ? float(a.bytes[from]) : mul(a.floats[from], 255.f);
}

struct Sample {  // a lerp of i and j
  int i, j;
  float weight;
};

__device__ inline Sample sample(int d, int n, double scale) {
  const double at = add(mul(double(d) + 0.5, scale), -0.5), low = floor(at);
  return {clamp_index(int(low), n), clamp_index(int(low) + 1, n), float(at - low)};
}

__device__ inline float lerp(float a, float b, float weight) { return fmaf(b - a, weight, a); }

__device__ inline float resized(const float* from, int h, int w, int y, int x, double scale_y, double scale_x) {
  const Sample sy = sample(y, h, scale_y), sx = sample(x, w, scale_x);
  const float *a = from + sy.i * w, *b = from + sy.j * w;
  return lerp(lerp(a[sx.i], a[sx.j], sx.weight), lerp(b[sx.i], b[sx.j], sx.weight), sy.weight);
}

__global__ void shrink(Level fine, Level coarse, double scale) {  // blockIdx.z: image
  const auto [x, y] = pixel_of_thread();
  if (x >= coarse.w || y >= coarse.h) return;
  coarse.images[int64_t(blockIdx.z) * coarse.n() + y * coarse.w + x] =
      resized(fine.images + int64_t(blockIdx.z) * fine.n(), fine.h, fine.w, y, x, scale, scale);
}

__global__ void enlarge(Level coarse, Level fine, float* to, float factor) {  // blockIdx.z: component of a pair
  const auto [x, y] = pixel_of_thread();
  if (x >= fine.w || y >= fine.h) return;
  const float* from = select(coarse.u, coarse.control[blockIdx.z / 2].flow) + int64_t(blockIdx.z) * coarse.n();
  to[int64_t(blockIdx.z) * fine.n() + y * fine.w + x] =
      mul(factor, resized(from, coarse.h, coarse.w, y, x, double(coarse.h) / double(fine.h),
                          double(coarse.w) / double(fine.w)));
}

__global__ void differentiate(Level l) {  // blockIdx.z: pair
  const auto [x, y] = pixel_of_thread();
  if (x >= l.w || y >= l.h) return;
  const int64_t pair = blockIdx.z;
  const float* image = l.images + (2 * pair + 1) * l.n();
  const float right = image[y * l.w + clamp_index(x + 1, l.w)], left = image[y * l.w + clamp_index(x - 1, l.w)];
  const float below = image[clamp_index(y + 1, l.h) * l.w + x], above = image[clamp_index(y - 1, l.h) * l.w + x];
  const int64_t row = l.w + 2 * BORDER;
  float* to = l.textures + 4 * ((pair * (l.h + 2 * BORDER) + y + BORDER) * row + x + BORDER);
  to[0] = image[y * l.w + x];
  to[1] = mul(0.5f, right - left);
  to[2] = mul(0.5f, below - above);
}

__device__ inline void cubic(float t, float* weights) {  // Keys' kernel with A = -3/4
  const float A = -0.75f, s = 1 - t, tt = mul(t, t), ss = mul(s, s);
  weights[0] = mul(A, mul(ss, t));
  weights[1] = fmaf(fmaf(A + 2, t, -(A + 3)), tt, 1.f);
  weights[3] = mul(A, mul(tt, s));
  weights[2] = add(add(add(1.f, -weights[0]), -weights[1]), -weights[3]);
}

__device__ inline float clamp(float x, float low, float high) { return x > low ? x < high ? x : high : low; }

__global__ void warp(Level l) {  // blockIdx.z: pair, which iterates from here on
  const auto [x, y] = pixel_of_thread();
  if (x >= l.w || y >= l.h) return;
  const int64_t pair = blockIdx.z;
  const int n = l.n(), at = y * l.w + x, row = 4 * (l.w + 2 * BORDER);
  if (at == 0) l.control[pair].active = 1;
  const float* flow = select(l.u, l.control[pair].flow) + 2 * pair * n + at;
  const float u = flow[0], v = flow[n];
  const float X = clamp(add(float(x), u), -3.f, float(l.w + 1));
  const float Y = clamp(add(float(y), v), -3.f, float(l.h + 1));
  const float left = floorf(X), top = floorf(Y);
  float wx[4], wy[4], sum[3] = {};
  cubic(X - left, wx);
  cubic(Y - top, wy);
  const float* tap = l.textures + pair * (l.h + 2 * BORDER) * row + (int(top) - 1 + BORDER) * row +
                     4 * (int(left) - 1 + BORDER);
  for (int j = 0; j < 4; ++j, tap += row) {
    for (int c = 0; c < 3; ++c) {
      float s = mul(wx[0], tap[c]);
      for (int k = 1; k < 4; ++k) s = fmaf(wx[k], tap[4 * k + c], s);
      sum[c] = j == 0 ? mul(wy[0], s) : fmaf(wy[j], s, sum[c]);
    }
  }
  const float I0 = l.images[2 * pair * n + at];
  float* to = l.data + 3 * pair * n + at;
  to[0] = sum[1];
  to[n] = sum[2];
  to[2 * n] = add(add(add(sum[0], -mul(sum[1], u)), -mul(sum[2], v)), -I0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Iterations
// ---------------------------------------------------------------------------------------------------------------------
__device__ inline float divergence(const float* px, const float* py, int at, Pixel pixel, int w) {
  const float above = pixel.y > 0 ? py[at - w] : 0.f;
  return pixel.x == 0 ? add(add(px[at], py[at]), -above) : add(add(px[at], -px[at - 1]), add(py[at], -above));
}

struct Planes {  // of a pair
  const float *u, *p, *data;
};
struct Move {
  float u, v, change;
};

// v = u + TH(u), u = v + theta div p, of one pixel
__device__ inline Move primal(const Level& l, const Planes& from, Pixel pixel) {
  const int n = l.n(), at = pixel.y * l.w + pixel.x;
  const float Ix = from.data[at], Iy = from.data[n + at], u = from.u[at], v = from.u[n + at];
  const float grad = add(mul(Ix, Ix), mul(Iy, Iy)), bound = mul(l.limit, grad);
  const float rho = add(from.data[2 * n + at], add(mul(Ix, u), mul(Iy, v)));
  const float inner = grad > 1.1920929e-7f ? -rho / grad : 0.f;
  const float move = rho < -bound ? l.limit : rho > bound ? -l.limit : inner;
  const float u_new = add(add(u, mul(move, Ix)), mul(l.theta, divergence(from.p, from.p + n, at, pixel, l.w)));
  const float v_new =
      add(add(v, mul(move, Iy)), mul(l.theta, divergence(from.p + 2 * n, from.p + 3 * n, at, pixel, l.w)));
  const float du = u_new - u, dv = v_new - v;
  return {u_new, v_new, add(mul(du, du), mul(dv, dv))};
}

// float(sqrt(double(x) * x + double(y) * y)). In floats, with what their roundings lost added up in `rest` (its own
// error: 2^-20 of the result's last place), unless that is too close to where a result's rounding changes.
__device__ inline float length(float x, float y) {
  const float xx = mul(x, x), yy = mul(y, y), square = add(xx, yy);
  if (square > 1e-20f && square < 1e30f) {
    const float large = fmaxf(xx, yy), small = fminf(xx, yy), inverse = rsqrtf(square), root = mul(square, inverse);
    const float lost = add(add(add(small, -add(square, -large)), fmaf(x, x, -xx)), fmaf(y, y, -yy));
    const float rest = mul(add(fmaf(-root, root, square), lost), mul(0.5f, inverse));
    const float low = fmaf(rest, 1 - 0x1p-18f, root), high = fmaf(rest, 1 + 0x1p-18f, root);
    if (low == high) return low;
  }
  return float(sqrt(add(mul(double(x), double(x)), mul(double(y), double(y)))));
}

// a / b with a division's rounding, from the rounded 1 / b, as tvl1_cpu.cpp has it
__device__ inline float quotient(float a, float b, float inverse) {
  const float q = mul(a, inverse);
  return fmaf(fmaf(-q, b, a), inverse, q);
}

// p = (p + tau/theta grad u) / (1 + tau/theta |grad u|) of one component
__device__ inline void dual(const Level& l, const float* from, float* to, float dx, float dy) {
  const bool moved = add(mul(dx, dx), mul(dy, dy)) > l.negligible;
  const float scale = moved ? add(1.f, mul(l.dual_step, length(dx, dy))) : 1.f, inverse = 1.f / scale;
  to[0] = quotient(add(from[0], mul(l.dual_step, dx)), scale, inverse);
  to[l.n()] = quotient(add(from[l.n()], mul(l.dual_step, dy)), scale, inverse);
}

__device__ inline double warp_sum(double x) {
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP_MASK, x, offset);
  return x;
}

// blockIdx.z: pair, a place in `pairs`. `sorted`: u comes from the median, which wrote it to the other plane.
__global__ void __launch_bounds__(THREADS) iterate(Level l, Pairs pairs, bool sorted) {
  const int64_t pair = pairs.at[blockIdx.z];
  const Control before = l.control[pair];
  if (!before.active) return;
  float* u_shared = shared_memory<float>();       // [2, TILE_H + 1, TILE_W + 1]
  float* changes = u_shared + 2 * SHARED_PIXELS;  // [TILE_H, TILE_W]
  const int n = l.n(), newest = before.flow ^ int(sorted);
  const Planes from{select(l.u, newest) + 2 * pair * n, select(l.p, before.dual) + 4 * pair * n,
                    l.data + 3 * pair * n};
  float *u_to = select(l.u, 1 - newest) + 2 * pair * n, *p_to = select(l.p, 1 - before.dual) + 4 * pair * n;

  const int column = threadIdx.x % TILE_W, row = threadIdx.x / TILE_W, own = row * SHARED_W + column;
  const Pixel pixel = pixel_of_thread();
  const bool inside = pixel.x < l.w && pixel.y < l.h;
  const int at = pixel.y * l.w + pixel.x;
  Move moved{};
  if (inside) {
    moved = primal(l, from, pixel);
    u_shared[own] = u_to[at] = moved.u;
    u_shared[SHARED_PIXELS + own] = u_to[n + at] = moved.v;
  }
  changes[threadIdx.x] = moved.change;
  if (threadIdx.x < TILE_W + TILE_H) {  // the row below the tile and the column to its right
    const bool below = threadIdx.x < TILE_W;
    const int x = below ? column : TILE_W, y = below ? TILE_H : int(threadIdx.x) - TILE_W;
    const Pixel other{int(blockIdx.x) * TILE_W + x, int(blockIdx.y) * TILE_H + y};
    if (other.x < l.w && other.y < l.h) {
      const Move beside = primal(l, from, other);
      u_shared[y * SHARED_W + x] = beside.u;
      u_shared[SHARED_PIXELS + y * SHARED_W + x] = beside.v;
    }
  }
  __syncthreads();
  if (inside) {
    for (int c = 0; c < 2; ++c) {
      const float* u = u_shared + c * SHARED_PIXELS + own;
      const float dx = pixel.x < l.w - 1 ? u[1] - u[0] : 0.f, dy = pixel.y < l.h - 1 ? u[SHARED_W] - u[0] : 0.f;
      dual(l, from.p + 2 * c * n + at, p_to + 2 * c * n + at, dx, dy);
    }
  }
  if (threadIdx.x >= WARP_SIZE) return;

  double sum = 0;  // of the tile
  for (int k = threadIdx.x; k < THREADS; k += WARP_SIZE) sum += double(changes[k]);
  sum = warp_sum(sum);
  int finished = 0;
  if (threadIdx.x == 0) {
    l.change[pair * l.tiles() + blockIdx.y * l.tiles_x + blockIdx.x] = sum;
    __threadfence();  // seen by all before this block counts as finished
    finished = atomicAdd(&l.control[pair].finished, 1) + 1;
  }
  if (__shfl_sync(FULL_WARP_MASK, finished, 0) < l.tiles()) return;
  __threadfence();
  sum = 0;  // of the pair; past the first-level cache, which doesn't see what other blocks write
  for (int k = threadIdx.x; k < l.tiles(); k += WARP_SIZE) sum += __ldcg(l.change + pair * l.tiles() + k);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) l.control[pair] = {sum > l.stop, 1 - newest, 1 - before.dual, 0};
}

// ---------------------------------------------------------------------------------------------------------------------
// Median of 5x5, borders repeated
// ---------------------------------------------------------------------------------------------------------------------
template <int LOW, int HIGH>
__device__ inline void exchange(float* e) {
  const float a = e[LOW], b = e[HIGH];
  e[LOW] = fminf(a, b);
  e[HIGH] = fmaxf(a, b);
}

template <const auto& PAIRS, size_t... I>
__device__ inline void exchange_all(float* e, std::index_sequence<I...>) {
  (exchange<PAIRS[I].low, PAIRS[I].high>(e), ...);
}

// blockIdx.z: component of a pair, a place in `pairs`. To the plane of u that isn't the newest; `iterate` knows.
__global__ void __launch_bounds__(THREADS) median(Level l, Pairs pairs) {
  const int64_t pair = pairs.at[blockIdx.z / 2], plane = (2 * pair + blockIdx.z % 2) * l.n();
  const Control control = l.control[pair];
  if (!control.active) return;
  const float* from = select(l.u, control.flow) + plane;
  float* sorted = shared_memory<float>();  // [5, TILE_H, SORTED_W]: each pixel's column of 5
  for (int k = threadIdx.x; k < SORTED; k += THREADS) {
    const int x = clamp_index(int(blockIdx.x) * TILE_W + k % SORTED_W - RADIUS, l.w);
    const int y = int(blockIdx.y) * TILE_H + k / SORTED_W;
    float e[5];
    for (int i = 0; i < 5; ++i) e[i] = from[clamp_index(y + i - RADIUS, l.h) * l.w + x];
    exchange_all<SORT5>(e, std::make_index_sequence<sizeof(SORT5) / sizeof(Exchange)>());
    for (int i = 0; i < 5; ++i) sorted[i * SORTED + k] = e[i];
  }
  __syncthreads();
  const auto [x, y] = pixel_of_thread();
  if (x >= l.w || y >= l.h) return;
  const float* own = sorted + threadIdx.x / TILE_W * SORTED_W + threadIdx.x % TILE_W;
  float e[25];
#pragma unroll
  for (int k = 0; k < 25; ++k) e[k] = own[k / 5 * SORTED + k % 5];
  exchange_all<MEDIAN25>(e, std::make_index_sequence<sizeof(MEDIAN25) / sizeof(Exchange)>());
  select(l.u, 1 - control.flow)[plane + y * l.w + x] = e[12];
}

__global__ void store(Level l, float* out) {  // blockIdx.z: component of a pair
  const auto [x, y] = pixel_of_thread();
  if (x >= l.w || y >= l.h) return;
  const int64_t at = int64_t(blockIdx.z) * l.n() + y * l.w + x;
  out[at] = select(l.u, l.control[blockIdx.z / 2].flow)[at];
}

}  // namespace
}  // namespace goca::tvl1::cuda

// TV-L1 on NVIDIA GPUs. The algorithm: tvl1.py; why the order of each operation counts: tvl1.h. The operations are
// those of tvl1_cpu.cpp, kept from contraction by mul and add, so that a GPU's flow has the CPU's bits.
//
// A batch of pairs goes through the pyramid together; a thread owns a pixel. An iteration is one launch over all tiles
// of all pairs: a block makes the new u of its tile, and of one row and column more, in shared memory, then the new p;
// old and new planes take turns, since neighbours read the old ones. `judge` then adds the tiles' squared changes, in
// double and in a fixed order, and ends a pair's iterations on the device: blocks of such a pair return at once. Which
// of two planes holds a pair's u, or its p, is a bit each. The host asks every CHECK iterations whether any pair goes
// on.
//
// A pixel-iteration moves 64 bytes. No atomics: runs repeat bit for bit, whatever the batch. Never run on a GPU so far:
// checked by tests/test_tvl1_cuda_on_cpu.py, which runs this file without one; speed unknown.
#include "tvl1_cuda.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace goca::tvl1::cuda {
namespace {

constexpr int THREADS = 256, WARP = 32, TILE_W = 32, TILE_H = THREADS / TILE_W, SHARED_W = TILE_W + 1;
constexpr int SHARED_PIXELS = SHARED_W * (TILE_H + 1);
constexpr int64_t CHECK = 10, MOST_BLOCKS = 1 << 30;
constexpr unsigned ALL_LANES = 0xffffffff;

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

struct Control {  // of a pair
  int going, flow, dual;  // whether it iterates; which planes hold u, and p
};

struct Level {
  int64_t pairs, h, w, tiles_x, tiles;  // tiles of one pair
  float *images;                        // [pairs, 2, h, w]: I0, I1
  float *u[2], *p[2];                   // [pairs, 2, h, w], [pairs, 4, h, w]: by x and y of u, by x and y of v
  float* data;                          // [pairs, 4, h, w]: Ix, Iy, |grad|^2, constant part of rho
  float* textures;                      // [pairs, h + 2 FRAME, w + 2 FRAME, 4]: I1, d/dx, d/dy, 0
  double* change;                       // [pairs, tiles]
  Control* control;                     // [pairs]
  float limit, theta, dual_step;
  double stop;

  __host__ __device__ int64_t n() const { return h * w; }
};

// One thread a pixel of `count` in a grid of whole blocks; -1 beyond.
__device__ inline int64_t pixel_of(int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  return i < count ? i : -1;
}

__device__ inline int64_t within(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Images: bytes to floats, bilinear resizing, central differences, bicubic warps
// ---------------------------------------------------------------------------------------------------------------------
__global__ void load(Args a, int64_t first, Level l) {
  const int64_t i = pixel_of(2 * l.pairs * l.n());
  if (i < 0) return;
  const int64_t pair = first + i / (2 * l.n()), second = i / l.n() % 2;
  const int64_t frame = pair / (a.frames - 1) * a.frames + pair % (a.frames - 1) + second;
  const int64_t at = frame * l.n() + i % l.n();
  l.images[i] = a.bytes ? float(a.bytes[at]) : mul(a.floats[at], 255.f);
}

struct Sample {  // a lerp of i and j
  int64_t i, j;
  float weight;
};

__device__ inline Sample sample(int64_t d, int64_t n, double scale) {
  const double at = add(mul(double(d) + 0.5, scale), -0.5), low = floor(at);
  return {within(int64_t(low), n), within(int64_t(low) + 1, n), float(at - low)};
}

__device__ inline float lerp(float a, float b, float weight) { return fmaf(b - a, weight, a); }

__device__ inline float resized(const float* from, int64_t h, int64_t w, int64_t y, int64_t x, double scale_y,
                                double scale_x) {
  const Sample sy = sample(y, h, scale_y), sx = sample(x, w, scale_x);
  const float *a = from + sy.i * w, *b = from + sy.j * w;
  return lerp(lerp(a[sx.i], a[sx.j], sx.weight), lerp(b[sx.i], b[sx.j], sx.weight), sy.weight);
}

__global__ void shrink(Level fine, Level coarse, double scale) {
  const int64_t i = pixel_of(2 * coarse.pairs * coarse.n());
  if (i < 0) return;
  coarse.images[i] = resized(fine.images + i / coarse.n() * fine.n(), fine.h, fine.w, i % coarse.n() / coarse.w,
                             i % coarse.w, scale, scale);
}

__global__ void enlarge(Level coarse, Level fine, float* to, float factor) {
  const int64_t i = pixel_of(2 * fine.pairs * fine.n());
  if (i < 0) return;
  const int64_t plane = i / fine.n();
  const float* from = coarse.u[coarse.control[plane / 2].flow] + plane * coarse.n();
  to[i] = mul(factor, resized(from, coarse.h, coarse.w, i % fine.n() / fine.w, i % fine.w,
                              double(coarse.h) / double(fine.h), double(coarse.w) / double(fine.w)));
}

__global__ void differentiate(Level l) {
  const int64_t i = pixel_of(l.pairs * l.n());
  if (i < 0) return;
  const int64_t pair = i / l.n(), y = i % l.n() / l.w, x = i % l.w;
  const float* image = l.images + (2 * pair + 1) * l.n();
  const float right = image[y * l.w + within(x + 1, l.w)], left = image[y * l.w + within(x - 1, l.w)];
  const float below = image[within(y + 1, l.h) * l.w + x], above = image[within(y - 1, l.h) * l.w + x];
  const int64_t row = l.w + 2 * FRAME;
  float* to = l.textures + 4 * ((pair * (l.h + 2 * FRAME) + y + FRAME) * row + x + FRAME);
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

__device__ inline float between(float x, float low, float high) { return x > low ? x < high ? x : high : low; }

__global__ void warp(Level l) {
  const int64_t i = pixel_of(l.pairs * l.n());
  if (i < 0) return;
  const int64_t pair = i / l.n(), at = i % l.n(), row = 4 * (l.w + 2 * FRAME);
  const float* flow = l.u[l.control[pair].flow] + 2 * pair * l.n() + at;
  const float u = flow[0], v = flow[l.n()];
  const float X = between(add(float(at % l.w), u), -3.f, float(l.w + 1));
  const float Y = between(add(float(at / l.w), v), -3.f, float(l.h + 1));
  const float left = floorf(X), top = floorf(Y);
  float wx[4], wy[4], sum[3] = {};
  cubic(X - left, wx);
  cubic(Y - top, wy);
  const float* tap = l.textures + pair * (l.h + 2 * FRAME) * row + (int64_t(top) - 1 + FRAME) * row +
                     4 * (int64_t(left) - 1 + FRAME);
  for (int j = 0; j < 4; ++j, tap += row) {
    for (int c = 0; c < 3; ++c) {
      float s = mul(wx[0], tap[c]);
      for (int k = 1; k < 4; ++k) s = fmaf(wx[k], tap[4 * k + c], s);
      sum[c] = j == 0 ? mul(wy[0], s) : fmaf(wy[j], s, sum[c]);
    }
  }
  const float I0 = l.images[2 * pair * l.n() + at];
  float* to = l.data + 4 * pair * l.n() + at;
  to[0] = sum[1];
  to[l.n()] = sum[2];
  to[2 * l.n()] = add(mul(sum[1], sum[1]), mul(sum[2], sum[2]));
  to[3 * l.n()] = add(add(add(sum[0], -mul(sum[1], u)), -mul(sum[2], v)), -I0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Iterations
// ---------------------------------------------------------------------------------------------------------------------
__device__ inline float divergence(const float* px, const float* py, int64_t at, int64_t x, int64_t y, int64_t w) {
  const float above = y > 0 ? py[at - w] : 0.f;
  return x == 0 ? add(add(px[at], py[at]), -above) : add(add(px[at], -px[at - 1]), add(py[at], -above));
}

// p = (p + tau/theta grad u) / (1 + tau/theta |grad u|) of one component
__device__ inline void dual(const float* from, float* to, int64_t n, float dx, float dy, float step) {
  const float norm = float(sqrt(add(mul(double(dx), double(dx)), mul(double(dy), double(dy)))));
  const float scale = add(1.f, mul(step, norm));
  to[0] = add(from[0], mul(step, dx)) / scale;
  to[n] = add(from[n], mul(step, dy)) / scale;
}

__device__ inline double block_sum(double x, double* shared) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  double sum = 0;
  for (int k = 0; k < THREADS / WARP; ++k) sum += shared[k];
  return sum;
}

__global__ void __launch_bounds__(THREADS) iterate(Level l) {
  const int64_t pair = blockIdx.x / l.tiles, tile = blockIdx.x % l.tiles, n = l.n();
  const Control control = l.control[pair];
  if (!control.going) return;
  double* sums = shared_memory<double>();
  float* u_shared = reinterpret_cast<float*>(sums + THREADS / WARP);  // [2, TILE_H + 1, TILE_W + 1]
  const int64_t x0 = tile % l.tiles_x * TILE_W, y0 = tile / l.tiles_x * TILE_H;
  const float *u = l.u[control.flow] + 2 * pair * n, *p = l.p[control.dual] + 4 * pair * n;
  const float* data = l.data + 4 * pair * n;
  float *u_to = l.u[1 - control.flow] + 2 * pair * n, *p_to = l.p[1 - control.dual] + 4 * pair * n;
  double change = 0;
  for (int k = threadIdx.x; k < SHARED_PIXELS; k += THREADS) {  // v = u + TH(u), u = v + theta div p
    const int64_t x = x0 + k % SHARED_W, y = y0 + k / SHARED_W, at = y * l.w + x;
    if (x >= l.w || y >= l.h) continue;
    const float Ix = data[at], Iy = data[n + at], grad = data[2 * n + at], a = u[at], b = u[n + at];
    const float rho = add(data[3 * n + at], add(mul(Ix, a), mul(Iy, b))), bound = mul(l.limit, grad);
    const float inner = grad > 1.1920929e-7f ? -rho / grad : 0.f;
    const float move = rho < -bound ? l.limit : rho > bound ? -l.limit : inner;
    const float u_new = add(add(a, mul(move, Ix)), mul(l.theta, divergence(p, p + n, at, x, y, l.w)));
    const float v_new = add(add(b, mul(move, Iy)), mul(l.theta, divergence(p + 2 * n, p + 3 * n, at, x, y, l.w)));
    u_shared[k] = u_new;
    u_shared[SHARED_PIXELS + k] = v_new;
    if (k % SHARED_W < TILE_W && k / SHARED_W < TILE_H) {
      const float du = u_new - a, dv = v_new - b;
      change += double(add(mul(du, du), mul(dv, dv)));
      u_to[at] = u_new;
      u_to[n + at] = v_new;
    }
  }
  change = block_sum(change, sums);
  if (threadIdx.x == 0) l.change[blockIdx.x] = change;
  const int64_t x = x0 + threadIdx.x % TILE_W, y = y0 + threadIdx.x / TILE_W, at = y * l.w + x;
  if (x >= l.w || y >= l.h) return;
  const float* own = u_shared + threadIdx.x / TILE_W * SHARED_W + threadIdx.x % TILE_W;
  for (int c = 0; c < 2; ++c, own += SHARED_PIXELS) {
    const float dx = x < l.w - 1 ? own[1] - own[0] : 0.f, dy = y < l.h - 1 ? own[SHARED_W] - own[0] : 0.f;
    dual(p + 2 * c * n + at, p_to + 2 * c * n + at, n, dx, dy, l.dual_step);
  }
}

enum class After { warp, median, iteration };

// One block a pair: what has just been done changes which planes are the newest, and whether the pair goes on.
__global__ void __launch_bounds__(THREADS) judge(Level l, After after) {
  Control& control = l.control[blockIdx.x];
  const Control before = control;
  double change = 0;
  if (after == After::iteration && before.going) {
    for (int64_t k = threadIdx.x; k < l.tiles; k += THREADS) change += l.change[blockIdx.x * l.tiles + k];
  }
  change = block_sum(change, shared_memory<double>());
  if (threadIdx.x != 0) return;
  if (after == After::warp) {
    control.going = 1;
  } else if (before.going) {
    control.flow = 1 - before.flow;
    if (after == After::iteration) {
      control.dual = 1 - before.dual;
      control.going = change > l.stop;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Median of 5x5, borders repeated
// ---------------------------------------------------------------------------------------------------------------------
template <int LOW, int HIGH>
__device__ inline void exchange(float* e) {
  const float a = e[LOW], b = e[HIGH];
  e[LOW] = a < b ? a : b;
  e[HIGH] = a < b ? b : a;
}

template <size_t... I>
__device__ inline void sort_column(float* e, std::index_sequence<I...>) {  // e, e + 5, ...
  (exchange<5 * SORT5[I].low, 5 * SORT5[I].high>(e), ...);
}

template <size_t... I>
__device__ inline void merge_columns(float* e, std::index_sequence<I...>) {
  (exchange<MEDIAN25[I].low, MEDIAN25[I].high>(e), ...);
}

__global__ void median(Level l) {
  const int64_t i = pixel_of(2 * l.pairs * l.n());
  if (i < 0) return;
  const int64_t plane = i / l.n(), y = i % l.n() / l.w, x = i % l.w;
  const Control control = l.control[plane / 2];
  if (!control.going) return;
  const float* from = l.u[control.flow] + plane * l.n();
  float e[25];
#pragma unroll
  for (int k = 0; k < 25; ++k) e[k] = from[within(y + k / 5 - 2, l.h) * l.w + within(x + k % 5 - 2, l.w)];
#pragma unroll
  for (int c = 0; c < 5; ++c) sort_column(e + c, std::make_index_sequence<sizeof(SORT5) / sizeof(Pair)>());
  merge_columns(e, std::make_index_sequence<sizeof(MEDIAN25) / sizeof(Pair)>());
  l.u[1 - control.flow][i] = e[12];
}

__global__ void store(Level l, float* out) {
  const int64_t i = pixel_of(2 * l.pairs * l.n());
  if (i >= 0) out[i] = l.u[l.control[i / (2 * l.n())].flow][i];
}

// ---------------------------------------------------------------------------------------------------------------------
// The host's part
// ---------------------------------------------------------------------------------------------------------------------
void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("TV-L1 on CUDA: ") + cudaGetErrorString(status));
}

template <typename... Args, typename... Given>
void launch(void (*kernel)(Args...), int64_t blocks, size_t shared, cudaStream_t stream, const Given&... given) {
  if (blocks > MOST_BLOCKS) throw std::runtime_error("TV-L1 on CUDA: too many pixels in a batch");
  std::tuple<Args...> args(given...);
  std::apply([&](auto&... x) {
    void* pointers[] = {&x...};
    check(cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(THREADS), pointers, shared, stream));
  }, args);
}

int64_t blocks_of(int64_t pixels) { return (pixels + THREADS - 1) / THREADS; }

// The levels, fine to coarse, in one piece of memory (null: sizes alone) -> its end, in bytes from its start.
size_t lay_out(const Args& a, int64_t pairs, char* memory, std::vector<Level>& levels) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
    used += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  const Params& p = a.params;
  int64_t h = a.h, w = a.w;
  for (int64_t s = 0; s < p.scales && (s == 0 || std::min(h, w) >= SMALLEST); ++s) {
    Level l{};
    l.pairs = pairs, l.h = h, l.w = w, l.tiles_x = (w + TILE_W - 1) / TILE_W;
    l.tiles = l.tiles_x * ((h + TILE_H - 1) / TILE_H);
    l.limit = float(p.lambda * p.theta), l.theta = float(p.theta), l.dual_step = float(p.tau / p.theta);
    l.stop = float(p.epsilon * p.epsilon * double(h * w));
    take(l.images, 2 * pairs * l.n());
    if (s == 0) {  // the rest is shared by the levels, one after the other
      for (float*& u : l.u) take(u, 2 * pairs * l.n());
      for (float*& q : l.p) take(q, 4 * pairs * l.n());
      take(l.data, 4 * pairs * l.n());
      take(l.textures, 4 * pairs * (h + 2 * FRAME) * (w + 2 * FRAME));
      take(l.change, pairs * l.tiles);
      take(l.control, pairs);
    } else {
      const Level& f = levels[0];
      l.u[0] = f.u[0], l.u[1] = f.u[1], l.p[0] = f.p[0], l.p[1] = f.p[1], l.data = f.data, l.textures = f.textures;
      l.change = f.change, l.control = f.control;
    }
    levels.push_back(l);
    h = std::llrint(double(h) * p.scale_step), w = std::llrint(double(w) * p.scale_step);
  }
  return used;
}

}  // namespace

size_t workspace_bytes(const Args& a, int64_t pairs) {
  std::vector<Level> levels;
  return lay_out(a, pairs, nullptr, levels);
}

void flow(const Args& a, int64_t first, int64_t pairs, void* workspace, cudaStream_t stream) {
  const Params& p = a.params;
  std::vector<Level> levels;
  lay_out(a, pairs, static_cast<char*>(workspace), levels);
  std::vector<Control> controls(pairs);
  constexpr size_t SUMS = sizeof(double) * (THREADS / WARP), SHARED = SUMS + 2 * SHARED_PIXELS * sizeof(float);

  launch(load, blocks_of(2 * pairs * levels[0].n()), 0, stream, a, first, levels[0]);
  for (size_t s = 1; s < levels.size(); ++s) {
    launch(shrink, blocks_of(2 * pairs * levels[s].n()), 0, stream, levels[s - 1], levels[s], 1 / p.scale_step);
  }
  for (size_t s = levels.size(); s-- > 0;) {
    const Level& l = levels[s];
    const int64_t n = l.n(), flow_bytes = 2 * pairs * n * sizeof(float);
    if (s + 1 == levels.size()) {
      check(cudaMemsetAsync(l.u[0], 0, flow_bytes, stream));
    } else {  // by way of l.data, since both planes of u may be some pair's newest
      launch(enlarge, blocks_of(2 * pairs * n), 0, stream, levels[s + 1], l, l.data, float(1 / p.scale_step));
      check(cudaMemcpyAsync(l.u[0], l.data, flow_bytes, cudaMemcpyDeviceToDevice, stream));
    }
    check(cudaMemsetAsync(l.control, 0, pairs * sizeof(Control), stream));
    check(cudaMemsetAsync(l.p[0], 0, 2 * flow_bytes, stream));
    check(cudaMemsetAsync(l.textures, 0, 4 * pairs * (l.h + 2 * FRAME) * (l.w + 2 * FRAME) * sizeof(float), stream));
    launch(differentiate, blocks_of(pairs * n), 0, stream, l);
    for (int64_t k = 0; k < p.warps; ++k) {
      launch(warp, blocks_of(pairs * n), 0, stream, l);
      launch(judge, pairs, SUMS, stream, l, After::warp);
      bool going = true;
      for (int64_t step = 0; going && step < p.inner * p.outer; ++step) {
        if (p.median && step % p.inner == 0) {
          launch(median, blocks_of(2 * pairs * n), 0, stream, l);
          launch(judge, pairs, SUMS, stream, l, After::median);
        }
        launch(iterate, pairs * l.tiles, SHARED, stream, l);
        launch(judge, pairs, SUMS, stream, l, After::iteration);
        if (step % CHECK == CHECK - 1) {
          check(cudaMemcpyAsync(controls.data(), l.control, pairs * sizeof(Control), cudaMemcpyDeviceToHost, stream));
          check(cudaStreamSynchronize(stream));
          going = std::any_of(controls.begin(), controls.end(), [](const Control& c) { return c.going; });
        }
      }
    }
  }
  launch(store, blocks_of(2 * pairs * levels[0].n()), 0, stream, levels[0], a.flow + first * 2 * a.h * a.w);
}

}  // namespace goca::tvl1::cuda

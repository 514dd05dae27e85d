// TV-L1 on the CPU. The algorithm: tvl1.py; why the order of each operation counts: tvl1.h.
//
// Each pair is one thread's. An iteration is one sweep over the rows, in place: row y of u needs the dual p of rows y
// and y-1, the new p of row y-1 needs the new u of rows y-1 and y. So step y makes u of row y, then p of row y-1, and
// with them the sum of the stop test. A pixel-iteration reads 40 bytes and writes 24; the 3 MB of a 320x240 pair stay
// in a third-level cache. Its 3 divisions and 2 square roots in double are most of its time. So several iterations one
// row behind the other, on rows still in the second-level cache, gain nothing (tried with 2, 4 and 8): what they did
// after the stop test has to be undone and repeated.
//
// Each pixel's operations are the same with any vectors (clones.h). The sum of the stop test is in double, where its
// order decides nothing.
//
// Rows are padded to whole vectors. What lies in the padding stays zero: no gradient, no data term, p cut off at w-1.
//
// Memory: 12 planes of floats and the pyramids a thread, some 7 MB at 320x240.
#include "clones.h"
#include "tvl1.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off", "no-trapping-math", "no-math-errno")
#endif

namespace goca::tvl1::cpu {
namespace {

constexpr int64_t LANES = 16;  // floats of the widest vector

// ---------------------------------------------------------------------------------------------------------------------
// Planes of one level
// ---------------------------------------------------------------------------------------------------------------------
struct Size {
  int64_t h, w;
  int64_t row() const { return (w + LANES - 1) / LANES * LANES; }  // what loops run over
  int64_t stride() const { return row() + LANES; }                 // with zeros before and behind
  int64_t plane() const { return (h + 1) * stride(); }             // with a row of zeros above
};

// Two components (u and v, or the halves of p by x and by y) are two planes.
struct Field {
  float *u, *v;
};
struct Level {
  Size size;
  std::vector<float> memory;
  Field flow, px, py, spare;  // px: the dual of d/dx, for u and for v
  float *Ix, *Iy, *grad, *rho;

  explicit Level(Size s) : size(s), memory(12 * s.plane() + 2 * LANES) {
    float* at = memory.data() + s.stride() + LANES;
    const auto take = [&] { return std::exchange(at, at + s.plane()); };
    for (Field* f : {&flow, &px, &py, &spare}) *f = {take(), take()};
    Ix = take(), Iy = take(), grad = take(), rho = take();
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// One step of one iteration
// ---------------------------------------------------------------------------------------------------------------------
struct Weights {
  float limit, theta, dual;  // lambda theta, theta, tau / theta
};

struct PrimalRow {
  float *u, *v;
  const float *pxu, *pxv, *pyu, *pyv, *pyu_above, *pyv_above, *Ix, *Iy, *grad, *rho;
};

// OpenCV's order: the first column has no left neighbour and adds up differently.
INLINE float divergence(float px, float px_left, float py, float py_above, bool first) {
  const float edge = (px + py) - py_above, inside = (px - px_left) + (py - py_above);
  return first ? edge : inside;
}

// v = u + TH(u), u = v + theta div p -> the squared change, summed over the row
TARGET_CLONES double primal_row(const PrimalRow& r, int64_t n, const Weights& w) {
  float *u = r.u, *v = r.v;
  const float *pxu = r.pxu, *pxv = r.pxv, *pyu = r.pyu, *pyv = r.pyv, *pyu_above = r.pyu_above,
              *pyv_above = r.pyv_above, *Ix = r.Ix, *Iy = r.Iy, *grad = r.grad, *rho0 = r.rho;
  const float limit = w.limit, theta = w.theta;
  double change = 0;
#pragma omp simd reduction(+ : change)
  for (int32_t x = 0; x < int32_t(n); ++x) {
    const float rho = rho0[x] + (Ix[x] * u[x] + Iy[x] * v[x]), bound = limit * grad[x], quotient = -rho / grad[x];
    float move = grad[x] > 1.1920929e-7f ? quotient : 0.f;
    move = rho > bound ? -limit : move;
    move = rho < -bound ? limit : move;
    const float du = theta * divergence(pxu[x], pxu[x - 1], pyu[x], pyu_above[x], x == 0);
    const float dv = theta * divergence(pxv[x], pxv[x - 1], pyv[x], pyv_above[x], x == 0);
    const float u_new = (u[x] + move * Ix[x]) + du, v_new = (v[x] + move * Iy[x]) + dv;
    const float cu = u_new - u[x], cv = v_new - v[x];
    change += double(cu * cu + cv * cv);
    u[x] = u_new;
    v[x] = v_new;
  }
  return change;
}

struct DualRow {  // of one component
  const float *u, *u_below;
  float *px, *py;
};

// a / b with a division's rounding, from the rounded 1 / b: two quotients for the price of one (Markstein).
INLINE float quotient(float a, float b, float inverse) {
  const float q = a * inverse;
  return std::fma(std::fma(-q, b, a), inverse, q);
}

// p = (p + tau/theta grad u) / (1 + tau/theta |grad u|). |.| as hypotf rounds it: once.
TARGET_CLONES void dual_row(const DualRow& r, int64_t n, int64_t last, const Weights& w) {
  const float *u = r.u, *u_below = r.u_below;
  float *px = r.px, *py = r.py;
  const float dual = w.dual;
#pragma omp simd
  for (int32_t x = 0; x < int32_t(n); ++x) {
    const float right = u[x + 1] - u[x], dx = x < int32_t(last) ? right : 0.f, dy = u_below[x] - u[x];
    const float norm = float(std::sqrt(double(dx) * double(dx) + double(dy) * double(dy)));
    const float scale = 1.f + dual * norm, inverse = 1.f / scale;
    px[x] = quotient(px[x] + dual * dx, scale, inverse);
    py[x] = quotient(py[x] + dual * dy, scale, inverse);
  }
}

double iterate(const Level& l, const Weights& w) {
  const int64_t h = l.size.h, stride = l.size.stride(), n = l.size.row(), last = l.size.w - 1;
  const auto dual = [&](int64_t at, int64_t below) {
    dual_row({l.flow.u + at, l.flow.u + below, l.px.u + at, l.py.u + at}, n, last, w);
    dual_row({l.flow.v + at, l.flow.v + below, l.px.v + at, l.py.v + at}, n, last, w);
  };
  double change = 0;
  for (int64_t y = 0; y < h; ++y) {
    const int64_t at = y * stride, above = at - stride;
    change += primal_row({l.flow.u + at, l.flow.v + at, l.px.u + at, l.px.v + at, l.py.u + at, l.py.v + at,
                          l.py.u + above, l.py.v + above, l.Ix + at, l.Iy + at, l.grad + at, l.rho + at}, n, w);
    if (y > 0) dual(above, at);
  }
  dual((h - 1) * stride, (h - 1) * stride);  // no difference across the border
  return change;
}

void median5(const float* from, float* to, const Size& size, std::vector<float>& memory);

// The iterations after one warp.
void solve(Level& l, const Params& p, const Weights& w, double stop, std::vector<float>& sorted) {
  for (int64_t outer = 0; outer < p.outer; ++outer) {
    if (p.median) {
      median5(l.flow.u, l.spare.u, l.size, sorted);
      median5(l.flow.v, l.spare.v, l.size, sorted);
      std::swap(l.flow, l.spare);
    }
    for (int64_t inner = 0; inner < p.inner; ++inner) {
      if (!(iterate(l, w) > stop)) return;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Median of 5x5, borders repeated
// ---------------------------------------------------------------------------------------------------------------------
// Vectors of the compiler's own: it doesn't find them in a loop of so many comparisons.
using Eight [[gnu::vector_size(32)]] = float;

INLINE Eight load(const float* from) {
  Eight x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

INLINE void exchange(Eight& low, Eight& high) {
  const Eight a = low, b = high;
  low = a < b ? a : b;
  high = a > b ? a : b;
}

template <const auto& PAIRS, size_t... I>
INLINE void exchange_all(Eight* e, std::index_sequence<I...>) {
  (exchange(e[PAIRS[I].low], e[PAIRS[I].high]), ...);
}

TARGET_CLONES void sort_columns(const float* const rows[5], float* sorted, int64_t stride, int64_t n) {
  for (int64_t x = 0; x < n; x += 8) {
    Eight column[5];
    for (int k = 0; k < 5; ++k) column[k] = load(rows[k] + x);
    exchange_all<SORT5>(column, std::make_index_sequence<std::size(SORT5)>());
    for (int k = 0; k < 5; ++k) std::memcpy(sorted + k * stride + x, &column[k], sizeof column[k]);
  }
}

TARGET_CLONES void median_row(const float* sorted, int64_t stride, float* to, int64_t n) {
  for (int64_t x = 0; x < n; x += 8) {
    Eight e[25];
    for (int k = 0; k < 25; ++k) e[k] = load(sorted + k / 5 * stride + x + k % 5 - 2);
    exchange_all<MEDIAN25>(e, std::make_index_sequence<std::size(MEDIAN25)>());
    std::memcpy(to + x, &e[12], sizeof e[12]);
  }
}

void median5(const float* from, float* to, const Size& size, std::vector<float>& memory) {
  const int64_t h = size.h, w = size.w, n = size.row(), stride = n + 2 * LANES;
  memory.resize(5 * stride);
  float* sorted = memory.data() + LANES;
  for (int64_t y = 0; y < h; ++y) {
    const float* rows[5];
    for (int64_t k = 0; k < 5; ++k) rows[k] = from + std::clamp<int64_t>(y + k - 2, 0, h - 1) * size.stride();
    sort_columns(rows, sorted, stride, n);
    for (float* row = sorted; row < sorted + 5 * stride; row += stride) {
      row[-2] = row[-1] = row[0];
      row[w] = row[w + 1] = row[w - 1];
    }
    median_row(sorted, stride, to + y * size.stride(), n);
    std::fill(to + y * size.stride() + w, to + y * size.stride() + n, 0.f);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Images: bilinear resizing, bicubic warps
// ---------------------------------------------------------------------------------------------------------------------
struct Image {
  int64_t h, w;
  std::vector<float> pixels;
  Image(int64_t h, int64_t w) : h(h), w(w), pixels(h * w) {}
};

struct Axis {  // sample d of an axis: a lerp of i[d] and j[d]
  std::vector<int64_t> i, j;
  std::vector<float> weight;
  Axis(int64_t from, int64_t to, double scale) : i(to), j(to), weight(to) {
    for (int64_t d = 0; d < to; ++d) {
      const double at = (double(d) + 0.5) * scale - 0.5, low = std::floor(at);
      i[d] = std::clamp<int64_t>(int64_t(low), 0, from - 1);
      j[d] = std::clamp<int64_t>(int64_t(low) + 1, 0, from - 1);
      weight[d] = float(at - low);
    }
  }
};

INLINE float lerp(float a, float b, float weight) { return std::fma(b - a, weight, a); }

TARGET_CLONES void resize(const float* from, int64_t from_stride, const Axis& ys, const Axis& xs, float factor,
                          float* to, int64_t to_stride) {
  for (size_t y = 0; y < ys.i.size(); ++y) {
    const float *a = from + ys.i[y] * from_stride, *b = from + ys.j[y] * from_stride;
    for (size_t x = 0; x < xs.i.size(); ++x) {
      const int64_t i = xs.i[x], j = xs.j[x];
      to[int64_t(y) * to_stride + int64_t(x)] =
          factor * lerp(lerp(a[i], a[j], xs.weight[x]), lerp(b[i], b[j], xs.weight[x]), ys.weight[y]);
    }
  }
}

std::vector<Image> pyramid(Image image, const Params& p) {
  std::vector<Image> levels{std::move(image)};
  while (int64_t(levels.size()) < p.scales) {
    const Image& fine = levels.back();
    Image coarse(std::llrint(double(fine.h) * p.scale_step), std::llrint(double(fine.w) * p.scale_step));
    if (std::min(coarse.h, coarse.w) < MIN_SIDE) break;
    const double scale = 1 / p.scale_step;
    resize(fine.pixels.data(), fine.w, Axis(fine.h, coarse.h, scale), Axis(fine.w, coarse.w, scale), 1.f,
           coarse.pixels.data(), coarse.w);
    levels.push_back(std::move(coarse));
  }
  return levels;
}

// An image and its central differences, side by side so that a tap of the warp is one load, in a frame of zeros.
struct Textures {
  int64_t h, w;
  std::vector<float> pixels;  // [h + 2 BORDER, w + 2 BORDER, 4]
  int64_t stride() const { return 4 * (w + 2 * BORDER); }
  const float* at(int64_t y, int64_t x) const { return pixels.data() + (y + BORDER) * stride() + 4 * (x + BORDER); }

  explicit Textures(const Image& I) : h(I.h), w(I.w), pixels((h + 2 * BORDER) * stride()) {
    for (int64_t y = 0; y < h; ++y) {
      const float* row = I.pixels.data() + y * w;
      const float *above = y > 0 ? row - w : row, *below = y < h - 1 ? row + w : row;
      float* to = const_cast<float*>(at(y, 0));
      for (int64_t x = 0; x < w; ++x, to += 4) {
        to[0] = row[x];
        to[1] = 0.5f * (row[x < w - 1 ? x + 1 : x] - row[x > 0 ? x - 1 : x]);
        to[2] = 0.5f * (below[x] - above[x]);
      }
    }
  }
};

INLINE void cubic(float t, float* weights) {  // Keys' kernel with A = -3/4
  const float A = -0.75f, s = 1 - t, tt = t * t, ss = s * s;
  weights[0] = A * (ss * t);
  weights[1] = std::fma(std::fma(A + 2, t, -(A + 3)), tt, 1.f);
  weights[3] = A * (tt * s);
  weights[2] = 1 - weights[0] - weights[1] - weights[3];
}

INLINE float clamp(float x, float low, float high) { return x > low ? x < high ? x : high : low; }  // NaN: low

// I1(x + u), its gradient, and what doesn't change until the next warp: |grad|^2 and the constant part of rho.
TARGET_CLONES void warp_row(const Textures& I1, const float* I0, const float* u, const float* v, int64_t y, float* Ix,
                     float* Iy, float* grad, float* rho) {
  for (int64_t x = 0; x < I1.w; ++x) {
    const float X = clamp(float(x) + u[x], -3.f, float(I1.w + 1));
    const float Y = clamp(float(y) + v[x], -3.f, float(I1.h + 1));
    const float left = std::floor(X), top = std::floor(Y);
    float wx[4], wy[4], sum[4], row[4];
    cubic(X - left, wx);
    cubic(Y - top, wy);
    const float* tap = I1.at(int64_t(top) - 1, int64_t(left) - 1);
    for (int j = 0; j < 4; ++j, tap += I1.stride()) {
      for (int c = 0; c < 4; ++c) row[c] = wx[0] * tap[c];
      for (int c = 0; c < 4; ++c) row[c] = std::fma(wx[1], tap[c + 4], row[c]);
      for (int c = 0; c < 4; ++c) row[c] = std::fma(wx[2], tap[c + 8], row[c]);
      for (int c = 0; c < 4; ++c) row[c] = std::fma(wx[3], tap[c + 12], row[c]);
      for (int c = 0; c < 4; ++c) sum[c] = j == 0 ? wy[0] * row[c] : std::fma(wy[j], row[c], sum[c]);
    }
    Ix[x] = sum[1];
    Iy[x] = sum[2];
    grad[x] = sum[1] * sum[1] + sum[2] * sum[2];
    rho[x] = ((sum[0] - sum[1] * u[x]) - sum[2] * v[x]) - I0[x];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pairs
// ---------------------------------------------------------------------------------------------------------------------
Image frame_of(const Args& a, int64_t index) {
  Image image(a.h, a.w);
  const int64_t n = a.h * a.w;
  for (int64_t i = 0; i < n; ++i) {
    image.pixels[i] = a.bytes ? float(a.bytes[index * n + i]) : a.floats[index * n + i] * 255.f;
  }
  return image;
}

void pair(const Args& a, int64_t video, int64_t t) {
  const Params& p = a.params;
  const Weights weights{float(p.lambda * p.theta), float(p.theta), float(p.tau / p.theta)};
  const auto first = pyramid(frame_of(a, video * a.frames + t), p);
  const auto second = pyramid(frame_of(a, video * a.frames + t + 1), p);
  std::vector<float> sorted;
  Level coarse({0, 0});
  for (size_t s = first.size(); s-- > 0;) {
    Level l({first[s].h, first[s].w});
    if (s + 1 < first.size()) {
      const Axis ys(coarse.size.h, l.size.h, double(coarse.size.h) / double(l.size.h));
      const Axis xs(coarse.size.w, l.size.w, double(coarse.size.w) / double(l.size.w));
      const float factor = float(1 / p.scale_step);
      resize(coarse.flow.u, coarse.size.stride(), ys, xs, factor, l.flow.u, l.size.stride());
      resize(coarse.flow.v, coarse.size.stride(), ys, xs, factor, l.flow.v, l.size.stride());
    }
    const Textures I1(second[s]);
    const double stop = float(p.epsilon * p.epsilon * double(l.size.h * l.size.w));
    for (int64_t warp = 0; warp < p.warps; ++warp) {
      for (int64_t y = 0; y < l.size.h; ++y) {
        const int64_t at = y * l.size.stride();
        warp_row(I1, first[s].pixels.data() + y * l.size.w, l.flow.u + at, l.flow.v + at, y, l.Ix + at, l.Iy + at,
                 l.grad + at, l.rho + at);
      }
      solve(l, p, weights, stop, sorted);
    }
    coarse = std::move(l);
  }
  float* out = a.flow + (video * (a.frames - 1) + t) * 2 * a.h * a.w;
  for (const float* plane : {coarse.flow.u, coarse.flow.v}) {
    for (int64_t y = 0; y < a.h; ++y, out += a.w) std::copy_n(plane + y * coarse.size.stride(), a.w, out);
  }
}

}  // namespace

void flow(const Args& a) {
  const int64_t pairs = a.videos * (a.frames - 1);
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(pairs, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {  // whoever is free takes the next: pairs differ threefold
      for (int64_t i; (i = next++) < pairs;) pair(a, i / (a.frames - 1), i % (a.frames - 1));
    }
  });
}

}  // namespace goca::tvl1::cpu

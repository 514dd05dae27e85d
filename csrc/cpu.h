// What the CPU kernels of the assignment and the loss share: SIMD loops, exp2, when to use another thread.
//
// Functions marked TARGET_CLONES have loops that the compiler vectorises (-fopenmp-simd). Sums over a row run in vector
// lanes, so machines with other vectors round differently, within the tests' tolerance (1e-5 on D in float32).
#pragma once
#include "clones.h"
#include "goca.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#define PRAGMA(text) _Pragma(#text)
#define SIMD PRAGMA(omp simd)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define SIMD_MAX(x) PRAGMA(omp simd reduction(max : x))

// One name for float and double: a template does the work, two functions carry the clones.
#define FOR_BOTH_TYPES(name, Args)                                \
  TARGET_CLONES void name(const Args<float>& a) { name##_of(a); } \
  TARGET_CLONES void name(const Args<double>& a) { name##_of(a); }

namespace goca::cpu {

constexpr int64_t MIN_ENTRIES_PER_THREAD = 32768;  // entries below which another thread costs more than it brings

// exp2(t) for t <= 127: 2^n by its bits, 2^r on |r| <= 1/2 by a minimax polynomial (relative error 2e-9 and 3e-18,
// below the rounding of float and double). Adding 1.5 * 2^mantissa rounds t to n and leaves n in the low bits. Below
// the smallest normal number the result is 0. NaN stays NaN.
INLINE float exp2_fast(float t) {
  const float low = t < -127.f ? -127.f : t, shifted = low + 12582912.f;
  const float r = low - (shifted - 12582912.f);
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  float y = 0.000153458121587f;
  y = y * r + 0.00133999312095f;
  y = y * r + 0.00961848895652f;
  y = y * r + 0.05550328777f;
  y = y * r + 0.240226468906f;
  y = y * r + 0.693147205737f;
  y = y * r + 1.f;
  return y * scale;
}

INLINE double exp2_fast(double t) {
  const double low = t < -1023. ? -1023. : t, shifted = low + 6755399441055744.;
  const double r = low - (shifted - 6755399441055744.);
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits - 0x4338000000000000LL + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
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
  return y * scale;
}

template <typename T>
INLINE T maximum(T a, T b) {
  return a > b ? a : b;
}

template <typename T>
INLINE T minimum(T a, T b) {
  return a > b ? b : a;
}

// Prefetch a row: the hardware's own prefetching ends at a page of 4 KB, and a row of 1000 floats is one page.
template <typename T>
INLINE void prefetch(const T* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + j);
}

}  // namespace goca::cpu

// TV-L1 optical flow (Zach, Pock, Bischof 2007): what tvl1.cpp hands to the kernels (tvl1_cpu.cpp, tvl1_cuda.cu), and the
// arithmetic of a pixel, which both share. The algorithm as a page of PyTorch: tvl1.py.
//
// The iteration amplifies: frames that differ by 0.001 grey levels give flow that differs by 0.01 to 0.03 px, because a
// warp may end a step earlier and because warps see 0 outside the picture. Close to OpenCV therefore means equal to it,
// bit for bit wherever that is possible: each operation below is IEEE float32, rounded one by one in OpenCV's order,
// without contraction to fused ones except where its vectors fuse. The same operations on every machine give the same
// bits: with any vectors, any number of threads, on the CPU and on the GPU.
#pragma once
#include <cstdint>

namespace goca::tvl1 {

struct Params {  // the names are those of tvl1.py
  double tau, lambda, theta;
  int64_t scales, warps;
  double epsilon;
  int64_t inner, outer;
  double scale_step;
  bool median;
};

struct Args {
  const uint8_t* bytes;  // frames [videos, frames, h, w]: either these
  const float* floats;   // or these, in 0..1
  int64_t videos, frames, h, w;
  Params params;
  float* flow;  // [videos, frames - 1, 2, h, w]
};

constexpr int64_t SMALLEST = 16;  // px: no level of the pyramid but the first has a shorter side

namespace cpu {
void flow(const Args&);
}  // namespace cpu

}  // namespace goca::tvl1

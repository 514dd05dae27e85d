// TV-L1 optical flow (Zach, Pock, Bischof 2007): what tvl1.cpp hands to the kernels. The algorithm as a page of
// PyTorch: tvl1.py.
//
// The iteration amplifies: frames that differ by 0.001 grey levels give flow that differs by 0.01 to 0.03 px, because a
// warp's iterations end one sooner or later and because warps see 0 outside the picture. To be close to OpenCV means to
// be equal to it: each operation is IEEE float32, rounded one by one in OpenCV's order, and fused only where OpenCV's
// vectors fuse. The same operations give the same bits with any vectors and any number of threads.
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

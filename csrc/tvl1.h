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

struct Exchange {
  uint8_t low, high;
};
// Networks of exchanges (minimum, maximum) for the median of 5x5.
constexpr Exchange SORT5[] = {{0, 1}, {3, 4}, {2, 4}, {2, 3}, {1, 4}, {0, 3}, {0, 2}, {1, 3}, {1, 2}};
// From 5 sorted columns, e[5 i + j] the i-th smallest of column j, to their median in e[12]: rows sorted, then the 13
// candidates merged, less every exchange that can be left out without a wrong result on the 6^5 sorted columns of zeros
// and ones (for networks of minima and maxima these decide).
constexpr Exchange MEDIAN25[] = {
    {3, 4},   {2, 4},   {2, 3},   {1, 4},   {0, 3},   {1, 3},   {5, 6},   {8, 9},   {7, 9},   {7, 8},
    {6, 9},   {5, 8},   {6, 8},   {6, 7},   {10, 11}, {13, 14}, {12, 14}, {12, 13}, {11, 14}, {10, 13},
    {10, 12}, {15, 16}, {18, 19}, {17, 18}, {16, 19}, {15, 18}, {15, 17}, {16, 18}, {16, 17}, {23, 24},
    {22, 24}, {20, 23}, {20, 22}, {21, 23}, {21, 22}, {3, 4},   {9, 11},  {17, 20}, {3, 7},   {4, 8},
    {9, 12},  {11, 13}, {4, 7},   {11, 12}, {4, 11},  {7, 9},   {8, 11},  {17, 21}, {8, 9},   {11, 12},
    {16, 17}, {20, 21}, {4, 16},  {8, 20},  {9, 15},  {11, 16}, {12, 17}, {8, 11},  {12, 15}, {11, 12}};

constexpr int64_t MIN_SIDE = 16;  // px: no level of the pyramid but the first has a shorter side

constexpr int64_t BORDER = 4;  // px of zeros around an image, which the bicubic warp may touch

namespace cpu {
void flow(const Args&);
}  // namespace cpu

}  // namespace goca::tvl1

// csrc/tvl1_cuda.cu on the CPU for test_tvl1_cuda_on_cpu.py (ctypes): batches of pairs, as from tvl1.cpp.
#include "../../csrc/tvl1_cuda.cu"

extern "C" void run(const uint8_t* bytes, const float* floats, const int64_t* sizes, const double* params,
                    int64_t batch, int64_t order, float* flow) {
  emulated::order = int(order);
  const goca::tvl1::Args args{bytes, floats, sizes[0], sizes[1], sizes[2], sizes[3],
                              {params[0], params[1], params[2], int64_t(params[3]), int64_t(params[4]), params[5],
                               int64_t(params[6]), int64_t(params[7]), params[8], params[9] == 5}, flow};
  std::vector<char> workspace(goca::tvl1::cuda::workspace_bytes(args, batch) + 256, char(0xff));  // NaN
  std::vector<goca::tvl1::cuda::Control> pinned(2 * batch);
  const int64_t pairs = args.videos * (args.frames - 1);
  for (int64_t first = 0; first < pairs; first += batch) {
    goca::tvl1::cuda::flow(args, first, std::min(batch, pairs - first), workspace.data(), pinned.data(), nullptr);
  }
}

extern "C" int64_t blocks() { return emulated::blocks; }

extern "C" void lengths(const float* x, const float* y, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = goca::tvl1::cuda::length(x[i], y[i]);
}

// TV-L1 on NVIDIA GPUs: what the host does. The algorithm: tvl1.py; why the order of each operation counts: tvl1.h; the
// kernels: tvl1_kernels.cuh.
//
// A batch of pairs goes through the pyramid together. Pairs end on the device, after few iterations of a warp or after
// all that are allowed. Every POLL_INTERVAL iterations the host learns which go on, without the device waiting for
// it, and launches blocks for these alone.
//
// Runs repeat bit for bit, whatever the batch. Never run on a GPU so far: checked by tests/cuda_on_cpu/test_tvl1_cuda_on_cpu.py,
// which runs these files without one; speed unknown.
#include "tvl1_cuda.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tvl1_kernels.cuh"

namespace goca::tvl1::cuda {
namespace {

constexpr int64_t POLL_INTERVAL = 10;      // iterations
constexpr int64_t MAX_PIXELS = 1 << 28;  // so that 4 planes of a pair have indices of 32 bits

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("TV-L1 on CUDA: ") + cudaGetErrorString(status));
}

// A block for each tile of `planes` planes, pairs or images of the level.
template <typename... Args, typename... Given>
void launch(void (*kernel)(Args...), const Level& l, int64_t planes, size_t shared, cudaStream_t stream,
            const Given&... given) {
  std::tuple<Args...> args(given...);
  std::apply([&](auto&... x) {
    void* pointers[] = {&x...};
    check(cudaLaunchKernel(kernel, dim3(l.tiles_x, l.tiles_y, unsigned(planes)), dim3(THREADS), pointers, shared,
                           stream));
  }, args);
}

// The levels, fine to coarse, in one piece of memory (null: sizes alone) -> its end, in bytes from its start.
size_t plan_memory(const Args& a, int64_t pairs, char* memory, std::vector<Level>& levels) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
    used += (count * sizeof(*pointer) + 255) / 256 * 256;
  };
  const Params& p = a.params;
  int64_t h = a.h, w = a.w;
  for (int64_t s = 0; s < p.scales && (s == 0 || std::min(h, w) >= MIN_SIDE); ++s) {
    Level l{};
    l.pairs = pairs, l.h = int(h), l.w = int(w);
    l.tiles_x = (l.w + TILE_W - 1) / TILE_W, l.tiles_y = (l.h + TILE_H - 1) / TILE_H;
    l.limit = float(p.lambda * p.theta), l.theta = float(p.theta), l.dual_step = float(p.tau / p.theta);
    l.negligible = float(0x1p-52 / (double(l.dual_step) * l.dual_step));  // 1 + dual_step |.| is 1 below its root
    l.stop = float(p.epsilon * p.epsilon * double(h * w));
    take(l.images, 2 * pairs * h * w);
    if (s == 0) {  // the rest is shared by the levels, one after the other
      for (float*& u : l.u) take(u, 2 * pairs * h * w);
      for (float*& q : l.p) take(q, 4 * pairs * h * w);
      take(l.data, 3 * pairs * h * w);
      take(l.textures, 4 * pairs * (h + 2 * BORDER) * (w + 2 * BORDER));
      take(l.change, pairs * l.tiles());
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

// The pairs that still iterate, as far as the host knows. It polls what was copied POLL_INTERVAL iterations ago, while
// the device works on those launched since: a pair that ended meanwhile costs blocks that return at once.
class ActivePairs {
 public:
  ActivePairs(int64_t pairs, Control* pinned, cudaStream_t stream) : pairs_(pairs), pinned_(pinned), stream_(stream) {
    for (cudaEvent_t& event : copied_) check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  }
  ~ActivePairs() {
    for (cudaEvent_t event : copied_) cudaEventSynchronize(event), cudaEventDestroy(event);
  }
  ActivePairs(const ActivePairs&) = delete;

  void reset() {
    count = pairs_;
    polls_ = 0;
    for (int64_t k = 0; k < pairs_; ++k) pairs.at[k] = uint8_t(k);
  }

  void poll(const Control* control) {
    const int64_t now = polls_++ % 2;
    check(cudaMemcpyAsync(pinned_ + now * pairs_, control, pairs_ * sizeof(Control), cudaMemcpyDeviceToHost, stream_));
    check(cudaEventRecord(copied_[now], stream_));
    if (polls_ == 1) return;
    check(cudaEventSynchronize(copied_[1 - now]));
    const Control* before = pinned_ + (1 - now) * pairs_;
    count = std::remove_if(pairs.at, pairs.at + count, [&](uint8_t k) { return !before[k].active; }) - pairs.at;
  }

  Pairs pairs{};
  int64_t count = 0;

 private:
  int64_t pairs_, polls_ = 0;
  Control* pinned_;
  cudaStream_t stream_;
  cudaEvent_t copied_[2];
};

}  // namespace

size_t workspace_bytes(const Args& a, int64_t pairs) {
  std::vector<Level> levels;
  return plan_memory(a, pairs, nullptr, levels);
}

void flow(const Args& a, int64_t first, int64_t pairs, void* workspace, Control* pinned, cudaStream_t stream) {
  if (a.h * a.w > MAX_PIXELS) throw std::runtime_error("TV-L1 on CUDA: frames of more than 2^28 pixels");
  const Params& p = a.params;
  std::vector<Level> levels;
  plan_memory(a, pairs, static_cast<char*>(workspace), levels);
  ActivePairs active(pairs, pinned, stream);
  constexpr size_t SHARED = (2 * SHARED_PIXELS + THREADS) * sizeof(float);

  launch(load, levels[0], 2 * pairs, 0, stream, a, first, levels[0]);
  for (size_t s = 1; s < levels.size(); ++s) {
    launch(shrink, levels[s], 2 * pairs, 0, stream, levels[s - 1], levels[s], 1 / p.scale_step);
  }
  for (size_t s = levels.size(); s-- > 0;) {
    const Level& l = levels[s];
    const int64_t flow_bytes = 2 * pairs * l.n() * sizeof(float);
    if (s + 1 == levels.size()) {
      check(cudaMemsetAsync(l.u[0], 0, flow_bytes, stream));
    } else {  // by way of l.data, since both planes of u may be some pair's newest
      launch(enlarge, l, 2 * pairs, 0, stream, levels[s + 1], l, l.data, float(1 / p.scale_step));
      check(cudaMemcpyAsync(l.u[0], l.data, flow_bytes, cudaMemcpyDeviceToDevice, stream));
    }
    check(cudaMemsetAsync(l.control, 0, pairs * sizeof(Control), stream));
    check(cudaMemsetAsync(l.p[0], 0, 2 * flow_bytes, stream));
    check(cudaMemsetAsync(l.textures, 0, 4 * pairs * (l.h + 2 * BORDER) * (l.w + 2 * BORDER) * sizeof(float), stream));
    launch(differentiate, l, pairs, 0, stream, l);
    for (int64_t k = 0; k < p.warps; ++k) {
      launch(warp, l, pairs, 0, stream, l);
      active.reset();
      for (int64_t step = 0; active.count > 0 && step < p.inner * p.outer; ++step) {
        const bool sorted = p.median && step % p.inner == 0;
        if (sorted) launch(median, l, 2 * active.count, 5 * SORTED * sizeof(float), stream, l, active.pairs);
        launch(iterate, l, active.count, SHARED, stream, l, active.pairs, sorted);
        if (step % POLL_INTERVAL == POLL_INTERVAL - 1) active.poll(l.control);
      }
    }
  }
  launch(store, levels[0], 2 * pairs, 0, stream, levels[0], a.flow + first * 2 * a.h * a.w);
}

}  // namespace goca::tvl1::cuda

// Just enough of CUDA to run csrc/*.cu on the CPU: each CUDA thread is a fibre, and fibres change at barriers.
//
// It shows what a kernel computes, that every thread reaches every barrier, and, by running the fibres in several
// orders, that no result hangs on an order which a barrier should have fixed. It shows nothing of speed or memory
// coherence.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define GOCA_EMULATED
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDACC__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

inline int64_t l2_bytes = 1 << 20, blocks_at_once = 3;  // of the card
inline int order = 0;                                    // 0 forward, 1 backward, else shuffled with this seed

struct Barrier {
  int64_t members = 0, waiting = 0, generation = 0;
};
struct Block {
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<double> shared;
  std::vector<uint64_t> shuffle;
};
struct Fibre {
  dim3 thread{0}, block{0};
  Block* home;
  ucontext_t start;
  jmp_buf here;  // where it goes on
  bool started = false, done = false;
};

inline Fibre* current;
inline dim3 grid_size{1}, block_size{1};
inline Barrier grid_barrier;
inline jmp_buf scheduler;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept: fresh ones would be cleared by the kernel at every launch
inline void (*body)(void*);
inline void* body_data;

// swapcontext would do, but calls the kernel at every change, to set the signal mask
inline void switch_to(Fibre& f) {
  if (_setjmp(scheduler)) return;
  current = &f;
  if (f.started) _longjmp(f.here, 1);
  f.started = true;
  setcontext(&f.start);
}

inline void switch_back() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline int64_t steps;   // arrivals at barriers, and ends
inline int64_t blocks;  // launched so far

inline void wait(Barrier& b) {
  const int64_t generation = b.generation;
  ++steps;
  if (++b.waiting == b.members) {
    b.waiting = 0;
    ++b.generation;
  }
  while (b.generation == generation) switch_back();
}

inline void run_fibre() {
  body(body_data);
  current->done = true;
  ++steps;
  switch_back();
}

// Blocks first .. last of the grid, all at once.
inline void run_blocks(unsigned first, unsigned last, size_t shared_bytes) {
  constexpr size_t STACK = 64 << 10;
  std::vector<Block> blocks(last - first);
  std::vector<std::unique_ptr<Fibre>> fibres;
  for (unsigned b = first; b < last; ++b) {
    Block& block = blocks[b - first];
    block.barrier.members = block_size.x;
    block.warps.resize((block_size.x + 31) / 32);
    block.shared.resize(shared_bytes / 8 + 1, NAN);
    block.shuffle.resize(block_size.x);
    for (unsigned t = 0; t < block_size.x; ++t) {
      auto f = std::make_unique<Fibre>();
      ++block.warps[t / 32].members;
      f->thread.x = t, f->home = &block;
      f->block = {b % grid_size.x, b / grid_size.x % grid_size.y, b / grid_size.x / grid_size.y};
      if (stacks.size() == fibres.size()) stacks.emplace_back(new char[STACK]);
      getcontext(&f->start);
      f->start.uc_stack.ss_sp = stacks[fibres.size()].get();
      f->start.uc_stack.ss_size = STACK;
      makecontext(&f->start, run_fibre, 0);
      fibres.push_back(std::move(f));
    }
  }
  grid_barrier = {int64_t(fibres.size())};
  std::mt19937 random(order);
  std::vector<size_t> turn(fibres.size());
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  for (size_t left = fibres.size(); left > 0;) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    const int64_t before = steps;
    for (size_t i : turn) {
      if (fibres[i]->done) continue;
      switch_to(*fibres[i]);
      left -= fibres[i]->done;
    }
    if (steps == before) {
      std::fprintf(stderr, "%zu threads wait at barriers that the others do not reach\n", left);
      std::abort();
    }
  }
}

template <typename F>
void run(dim3 grid, dim3 block, size_t shared, bool at_once, F f) {
  grid_size = grid, block_size = block;
  body = [](void* data) { (*static_cast<F*>(data))(); };
  body_data = &f;
  if (at_once) return run_blocks(0, grid.x, shared);
  const unsigned count = grid.x * grid.y * grid.z;
  blocks += count;
  for (unsigned k = 0; k < count; ++k) {
    const unsigned b = order == 1 ? count - 1 - k : k;
    run_blocks(b, b + 1, shared);
  }
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::current->block)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline void __syncthreads() { emulated::wait(emulated::current->home->barrier); }

namespace emulated {
template <typename T>
T of_thread(unsigned other, T x) {  // the x of a thread of the same warp
  Block& block = *current->home;
  const unsigned t = threadIdx.x;
  std::memcpy(&block.shuffle[t], &x, sizeof(T));
  wait(block.warps[t / 32]);
  std::memcpy(&x, &block.shuffle[other], sizeof(T));
  wait(block.warps[t / 32]);
  return x;
}
}  // namespace emulated

template <typename T>
T __shfl_xor_sync(unsigned, T x, int offset) { return emulated::of_thread(threadIdx.x ^ offset, x); }

template <typename T>
T __shfl_sync(unsigned, T x, int lane) { return emulated::of_thread(threadIdx.x / 32 * 32 + lane, x); }

inline void __threadfence() {}

template <typename T>
T atomicAdd(T* to, T x) {
  const T before = *to;
  *to += x;
  return before;
}

template <typename T>
T __ldcg(const T* from) { return *from; }

// A card's is within two last places; so is this, now above and now below.
inline float rsqrtf(float x) {
  float exact = float(1 / std::sqrt(double(x)));
  uint32_t bits, hash;
  std::memcpy(&hash, &x, sizeof x);
  std::memcpy(&bits, &exact, sizeof bits);
  bits += (hash * 2654435761u >> 30) - 2;  // -2 .. 1
  std::memcpy(&exact, &bits, sizeof bits);
  return exact;
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulated::current->home->shared.data());
}

// The runtime's functions that the kernels' files call
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrL2CacheSize, cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrL2CacheSize ? emulated::l2_bytes : 1;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  return *blocks = emulated::blocks_at_once, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice, cudaMemcpyDeviceToHost };
// What goes to the host is there once an event after it was waited for, and not sooner.
struct Copy {
  void* to;
  std::vector<char> bytes;
};
struct Event {
  size_t copies = 0;
};
using cudaEvent_t = Event*;
namespace emulated {
inline std::vector<Copy> copies;
inline size_t arrived = 0;
}  // namespace emulated
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind == cudaMemcpyDeviceToDevice) return std::memcpy(to, from, bytes), cudaSuccess;
  const char* first = static_cast<const char*>(from);
  emulated::copies.push_back({to, {first, first + bytes}});
  return std::memset(to, 0xff, bytes), cudaSuccess;
}
enum { cudaEventDisableTiming };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) { return *event = new Event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return event->copies = emulated::copies.size(), cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  for (; emulated::arrived < event->copies; ++emulated::arrived) {
    const Copy& copy = emulated::copies[emulated::arrived];
    std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  }
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }

template <typename... Args, size_t... I>
void emulated_call(void (*kernel)(Args...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Args>*>(args[I])...);
}
template <typename... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  emulated::run(grid, block, shared, false, [=] { emulated_call(kernel, args, std::index_sequence_for<Args...>()); });
  return cudaSuccess;
}
template <typename... Args>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** args, size_t shared,
                                        cudaStream_t) {
  if (grid.x > emulated::blocks_at_once) return cudaErrorInvalidValue;
  emulated::run(grid, block, shared, true, [=] { emulated_call(kernel, args, std::index_sequence_for<Args...>()); });
  return cudaSuccess;
}

// torch.ops.goca.tvl1_flow: schema, checks, allocation. tvl1.py checks what users hand over, in its own words.
#include "tvl1.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>  // ATen.h, with every operator, takes the compiler twice as long
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#ifdef GOCA_CUDA
#include "tvl1_cuda.h"
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace goca {
namespace {

using at::Tensor;

void check(const Tensor& frames, double tau, double lambda, double theta, int64_t scales, int64_t warps, double epsilon,
           int64_t inner, int64_t outer, double scale_step, int64_t median) {
  TORCH_CHECK_VALUE(frames.dim() == 4, "frames must have shape [B, T, H, W], got ", frames.sym_sizes());
  TORCH_CHECK_VALUE(frames.scalar_type() == at::kByte || frames.scalar_type() == at::kFloat,
                    "frames must be uint8 or float32, got ", frames.scalar_type());
  TORCH_CHECK_VALUE(frames.sym_size(1) >= 2 && frames.sym_numel() > 0, "frames must hold at least one pair, got ",
                    frames.sym_sizes());
  for (const auto& [name, value] : {std::pair("tau", tau), {"lam", lambda}, {"theta", theta}}) {
    TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), name, " must be a positive number, got ", value);
  }
  for (const auto& [name, value] :
       {std::pair("scales", scales), {"warps", warps}, {"inner", inner}, {"outer", outer}}) {
    TORCH_CHECK_VALUE(value >= 1, name, " must be at least 1, got ", value);
  }
  TORCH_CHECK_VALUE(epsilon >= 0 && std::isfinite(epsilon), "epsilon must be a number of 0 or more, got ", epsilon);
  TORCH_CHECK_VALUE(scale_step > 0 && scale_step < 1, "scale_step must lie between 0 and 1, got ", scale_step);
  TORCH_CHECK_VALUE(median == 1 || median == 5, "median must be 5, or 1 for none, got ", median);
}

Tensor empty_flow(const Tensor& frames) {
  return at::empty_symint({frames.sym_size(0), frames.sym_size(1) - 1, 2, frames.sym_size(2), frames.sym_size(3)},
                          frames.options().dtype(at::kFloat));
}

#ifdef GOCA_CUDA
// BATCH pairs together. Where memory doesn't suffice for these it throws: who called knows how to divide what it has.
void flow_on_cuda(const tvl1::Args& args, const at::TensorOptions& options) {
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const int64_t pairs = args.videos * (args.frames - 1), batch = std::min(pairs, tvl1::cuda::BATCH);
  const Tensor workspace = at::empty({int64_t(tvl1::cuda::workspace_bytes(args, batch))}, options.dtype(at::kByte));
  const Tensor pinned = at::empty({2 * batch * int64_t(sizeof(tvl1::cuda::Control))},
                                  at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  for (int64_t first = 0; first < pairs; first += batch) {
    tvl1::cuda::flow(args, first, std::min(batch, pairs - first), workspace.mutable_data_ptr(),
                     static_cast<tvl1::cuda::Control*>(pinned.mutable_data_ptr()), stream);
  }
}
#endif

Tensor tvl1_flow(const Tensor& frames, double tau, double lambda, double theta, int64_t scales, int64_t warps,
                 double epsilon, int64_t inner, int64_t outer, double scale_step, int64_t median) {
  check(frames, tau, lambda, theta, scales, warps, epsilon, inner, outer, scale_step, median);
#ifdef GOCA_CUDA
  const c10::cuda::OptionalCUDAGuard guard(frames.is_cuda() ? std::make_optional(frames.device()) : std::nullopt);
#endif
  const Tensor x = frames.contiguous();
  Tensor flow = empty_flow(x);
  const bool bytes = x.scalar_type() == at::kByte;
  const tvl1::Args args{bytes ? x.const_data_ptr<uint8_t>() : nullptr, bytes ? nullptr : x.const_data_ptr<float>(),
                        x.size(0), x.size(1), x.size(2), x.size(3),
                        {tau, lambda, theta, scales, warps, epsilon, inner, outer, scale_step, median == 5},
                        flow.mutable_data_ptr<float>()};
#ifdef GOCA_CUDA
  if (x.is_cuda()) {
    flow_on_cuda(args, x.options());
    return flow;
  }
#endif
  tvl1::cpu::flow(args);
  return flow;
}

Tensor tvl1_flow_meta(const Tensor& frames, double tau, double lambda, double theta, int64_t scales, int64_t warps,
                      double epsilon, int64_t inner, int64_t outer, double scale_step, int64_t median) {
  check(frames, tau, lambda, theta, scales, warps, epsilon, inner, outer, scale_step, median);
  return empty_flow(frames);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(goca, m) {
  m.def("tvl1_flow(Tensor frames, float tau, float lam, float theta, int scales, int warps, float epsilon, int inner, "
        "int outer, float scale_step, int median) -> Tensor");
}
TORCH_LIBRARY_IMPL(goca, CPU, m) { m.impl("tvl1_flow", tvl1_flow); }
#ifdef GOCA_CUDA
TORCH_LIBRARY_IMPL(goca, CUDA, m) { m.impl("tvl1_flow", tvl1_flow); }
#endif
TORCH_LIBRARY_IMPL(goca, Meta, m) { m.impl("tvl1_flow", tvl1_flow_meta); }

}  // namespace goca

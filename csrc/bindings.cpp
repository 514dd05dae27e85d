// torch.ops.goca: schemas, checks, allocation, autograd; one operator family for CPU and CUDA (contracts: goca.py).
//
// goca.py checks its users' arguments in its own words; the checks here guard torch.ops.goca itself. The losses return
// (loss, gradient): the forward pass forms both at once where a gradient is needed, and the backward pass only scales.
// The second output serves that alone and is not differentiable.
#include "goca.h"
#ifdef GOCA_CUDA
#include "cuda.h"
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

namespace goca {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using PriorViews = std::array<bool, 2>;

// ---------------------------------------------------------------------------------------------------------------------
// Checks, before any kernel starts
// ---------------------------------------------------------------------------------------------------------------------
void check_scores(const Tensor& x, int64_t dims, const char* shape) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && (dims == 0 || x.dim() == dims), "scores must have shape ", shape, ", got ",
                    x.sym_sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                    "scores must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sym_numel() > 0, "scores must not be empty, got ", x.sym_sizes());
}

void check_like(const char* name, const Tensor& x, const Tensor& scores, at::SymIntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.sym_sizes() == sizes, name, " must have shape ", sizes, " to fit scores, got ", x.sym_sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == scores.scalar_type(), name, " must have the dtype of scores, ",
                    scores.scalar_type(), ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == scores.device(), name, " must be on the device of scores, ", scores.device(),
                    ", got ", x.device());
}

void check_weights(double lambda1, double lambda2, int64_t prior_sign, const c10::SymInt& iters) {
  TORCH_CHECK_VALUE(lambda1 > 0 && std::isfinite(lambda1), "lambda1 must be a positive number, got ", lambda1);
  TORCH_CHECK_VALUE(lambda2 >= 0 && std::isfinite(lambda2), "lambda2 must be a number of 0 or more, got ", lambda2);
  TORCH_CHECK_VALUE(prior_sign == 1 || prior_sign == -1, "prior_sign must be +1 or -1, got ", prior_sign);
  TORCH_CHECK_VALUE(iters >= 1, "iters must be at least 1, got ", iters);
}

void check_crops(const Tensor& scores, const c10::SymInt& assigning, double temperature) {
  TORCH_CHECK_VALUE(scores.sym_size(1) >= 2, "scores must hold at least 2 crops, got ", scores.sym_sizes());
  TORCH_CHECK_VALUE(assigning >= 1 && assigning <= scores.sym_size(1), "there must be 1 to ", scores.sym_size(1),
                    " assigning crops, got ", assigning);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature must be a positive number, got ",
                    temperature);
}

void check_assign(const Tensor& scores, const std::optional<Tensor>& log_prior, double lambda1, double lambda2,
                  int64_t prior_sign, const c10::SymInt& iters) {
  check_weights(lambda1, lambda2, prior_sign, iters);
  check_scores(scores, 0, "[..., M, N]");
  if (log_prior) check_like("log_prior", *log_prior, scores, scores.sym_sizes());
}

void check_guided_assign(const Tensor& scores, double lambda1, double lambda2, int64_t prior_sign,
                         const c10::SymInt& iters) {
  check_weights(lambda1, lambda2, prior_sign, iters);
  check_scores(scores, 4, "[2, A, M, N]");
  TORCH_CHECK_VALUE(scores.sym_size(0) == 2, "scores must hold two views, got ", scores.sym_sizes());
}

void check_swapped_loss(const Tensor& scores, const Tensor& log_targets, double temperature) {
  check_scores(scores, 4, "[G, V, m, N]");
  TORCH_CHECK_VALUE(log_targets.dim() == 4, "log_targets must have shape [G, A, m, N], got ", log_targets.sym_sizes());
  check_crops(scores, log_targets.sym_size(1), temperature);
  check_like("log_targets", log_targets, scores,
             {scores.sym_size(0), log_targets.sym_size(1), scores.sym_size(2), scores.sym_size(3)});
}

void check_guided_loss(const Tensor& scores, const Tensor& batch_scores, const c10::SymInt& first_row, double lambda1,
                       double lambda2, int64_t prior_sign, const c10::SymInt& iters, double temperature) {
  check_weights(lambda1, lambda2, prior_sign, iters);
  check_scores(scores, 4, "[2, V, m, N]");
  TORCH_CHECK_VALUE(batch_scores.dim() == 4, "batch_scores must have shape [2, A, M, N], got ",
                    batch_scores.sym_sizes());
  check_crops(scores, batch_scores.sym_size(1), temperature);
  TORCH_CHECK_VALUE(scores.sym_size(0) == 2, "scores must hold two views, got ", scores.sym_sizes());
  check_like("batch_scores", batch_scores, scores,
             {scores.sym_size(0), batch_scores.sym_size(1), batch_scores.sym_size(2), scores.sym_size(3)});
  TORCH_CHECK_VALUE(first_row >= 0 && first_row <= batch_scores.sym_size(2) - scores.sym_size(2),
                    "first_row must leave the own rows within batch_scores, got ", first_row);
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernel calls: contiguous rows, sizes, dispatch on dtype and device, one allocation for the workspace
// ---------------------------------------------------------------------------------------------------------------------
int64_t chunk_rows(const Tensor& x) { return x.is_cuda() ? CUDA_CHUNK : CPU_CHUNK; }

Tensor contiguous_rows(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

template <typename T>
Matrices<T> matrices(const Tensor& x) {  // [views, crops, rows, N]
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
struct Kernels {  // of the device, on the current stream
  const Tensor& like;
  void solve(const AssignArgs<T>& a, const Solution<T>& s) const {
#ifdef GOCA_CUDA
    if (like.is_cuda()) return cuda::solve(a, s, c10::cuda::getCurrentCUDAStream().stream());
#endif
    cpu::solve(a, s);
  }
  void log_assignment(const AssignArgs<T>& a, const Solution<T>& s) const {
#ifdef GOCA_CUDA
    if (like.is_cuda()) return cuda::log_assignment(a, s, c10::cuda::getCurrentCUDAStream().stream());
#endif
    cpu::log_assignment(a, s);
  }
  void swapped_loss(const LossArgs<T>& a) const {
#ifdef GOCA_CUDA
    if (like.is_cuda()) return cuda::swapped_loss(a, c10::cuda::getCurrentCUDAStream().stream());
#endif
    cpu::swapped_loss(a);
  }
};

#ifdef GOCA_CUDA
#define GUARD_DEVICE(x) \
  const c10::cuda::OptionalCUDAGuard guard(x.is_cuda() ? std::make_optional(x.device()) : std::nullopt)
#else
#define GUARD_DEVICE(x)
#endif

template <typename T>
AssignArgs<T> assign_args(const Tensor& scores, PriorViews prior_views, double lambda1, double lambda2,
                          int64_t prior_sign, int64_t iters) {
  return {scores.size(0), scores.size(1), scores.size(2), scores.size(3), matrices<T>(scores), {},
          {prior_views[0], prior_views[1]}, lambda1, lambda2, static_cast<int>(prior_sign), iters};
}

Tensor assign(const Tensor& scores, const std::optional<Tensor>& log_prior, double lambda1, double lambda2,
              int64_t prior_sign, int64_t iters) {
  check_assign(scores, log_prior, lambda1, lambda2, prior_sign, iters);
  GUARD_DEVICE(scores);
  const int64_t M = scores.size(-2), N = scores.size(-1);
  const Tensor x = contiguous_rows(scores.reshape({-1, 1, M, N}));
  const Tensor prior = log_prior ? contiguous_rows(log_prior->reshape({-1, 1, M, N})) : Tensor();
  const int64_t B = x.size(0);
  Tensor log_d = at::empty(scores.sizes(), scores.options(), at::MemoryFormat::Contiguous);
  Tensor rest = at::empty({potentials_size(B, M, N, chunk_rows(scores))}, scores.options());
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "goca::assign", [&] {
    auto a = assign_args<scalar_t>(x, {false, false}, lambda1, lambda2, prior_sign, iters);
    if (log_prior) a.log_prior = matrices<scalar_t>(prior);
    const auto s = partition(log_d.mutable_data_ptr<scalar_t>(), rest.mutable_data_ptr<scalar_t>(), B, M, N,
                           chunk_rows(scores));
    const Kernels<scalar_t> kernels{scores};
    kernels.solve(a, s);
    kernels.log_assignment(a, s);
  });
  return log_d;
}

Tensor guided_assign(const Tensor& scores, double lambda1, double lambda2, int64_t prior_sign, int64_t iters,
                     PriorViews prior_views) {
  check_guided_assign(scores, lambda1, lambda2, prior_sign, iters);
  GUARD_DEVICE(scores);
  const Tensor x = contiguous_rows(scores);
  const int64_t B = x.size(0) * x.size(1), M = x.size(2), N = x.size(3);
  Tensor log_d = at::empty(scores.sizes(), scores.options(), at::MemoryFormat::Contiguous);
  Tensor rest = at::empty({potentials_size(B, M, N, chunk_rows(scores))}, scores.options());
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "goca::guided_assign", [&] {
    const auto a = assign_args<scalar_t>(x, prior_views, lambda1, lambda2, prior_sign, iters);
    const auto s = partition(log_d.mutable_data_ptr<scalar_t>(), rest.mutable_data_ptr<scalar_t>(), B, M, N,
                           chunk_rows(scores));
    const Kernels<scalar_t> kernels{scores};
    kernels.solve(a, s);
    kernels.log_assignment(a, s);
  });
  return log_d;
}

template <typename T>
std::tuple<Tensor, Tensor> loss_of(LossArgs<T> a, const Tensor& scores, double temperature, bool with_gradient) {
  Tensor loss = at::empty({}, scores.options());
  Tensor gradient = with_gradient ? at::empty(scores.sizes(), scores.options(), at::MemoryFormat::Contiguous)
                                  : at::empty({0}, scores.options());
  Tensor terms = at::empty({scores.size(0) * scores.size(2)}, scores.options().dtype(at::kDouble));
  a.views = scores.size(0), a.crops = scores.size(1), a.m = scores.size(2), a.N = scores.size(3);
  a.scores = matrices<T>(scores);
  a.inverse_temperature = 1 / temperature;
  a.weight = 1 / (static_cast<double>(a.views) * a.m * a.assigning * (a.crops - 1));
  a.loss = loss.mutable_data_ptr<T>();
  a.gradient = with_gradient ? gradient.mutable_data_ptr<T>() : nullptr;
  a.terms = terms.mutable_data_ptr<double>();
  Kernels<T>{scores}.swapped_loss(a);
  return {loss, gradient};
}

std::tuple<Tensor, Tensor> swapped_loss(const Tensor& scores, const Tensor& log_targets, double temperature,
                                        bool with_gradient) {
  check_swapped_loss(scores, log_targets, temperature);
  GUARD_DEVICE(scores);
  const Tensor x = contiguous_rows(scores), targets = contiguous_rows(log_targets);
  return AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "goca::swapped_loss", [&] {
    LossArgs<scalar_t> a{};
    a.assigning = targets.size(1);
    a.log_targets = matrices<scalar_t>(targets);
    return loss_of(a, x, temperature, with_gradient);
  });
}

std::tuple<Tensor, Tensor> guided_loss(const Tensor& scores, const Tensor& batch_scores, int64_t first_row,
                                       double lambda1, double lambda2, int64_t prior_sign, int64_t iters,
                                       PriorViews prior_views, double temperature, bool with_gradient) {
  check_guided_loss(scores, batch_scores, first_row, lambda1, lambda2, prior_sign, iters, temperature);
  GUARD_DEVICE(scores);
  const Tensor x = contiguous_rows(scores), all = contiguous_rows(batch_scores);
  const int64_t B = all.size(0) * all.size(1), M = all.size(2), N = all.size(3);
  Tensor work = at::empty({B * M * N + potentials_size(B, M, N, chunk_rows(scores))}, scores.options());
  return AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "goca::guided_loss", [&] {
    const auto assignment = assign_args<scalar_t>(all, prior_views, lambda1, lambda2, prior_sign, iters);
    scalar_t* E = work.mutable_data_ptr<scalar_t>();
    const auto s = partition(E, E + B * M * N, B, M, N, chunk_rows(scores));
    Kernels<scalar_t>{scores}.solve(assignment, s);
    LossArgs<scalar_t> a{};
    a.assigning = all.size(1);
    a.solution = s;
    a.M = M, a.first_row = first_row;
    return loss_of(a, x, temperature, with_gradient);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Shapes without data, for fake tensors and torch.compile
// ---------------------------------------------------------------------------------------------------------------------
Tensor assign_meta(const Tensor& scores, const std::optional<Tensor>& log_prior, double lambda1, double lambda2,
                   int64_t prior_sign, c10::SymInt iters) {
  check_assign(scores, log_prior, lambda1, lambda2, prior_sign, iters);
  return at::empty_symint(scores.sym_sizes(), scores.options());
}

Tensor guided_assign_meta(const Tensor& scores, double lambda1, double lambda2, int64_t prior_sign, c10::SymInt iters,
                          PriorViews) {
  check_guided_assign(scores, lambda1, lambda2, prior_sign, iters);
  return at::empty_symint(scores.sym_sizes(), scores.options());
}

std::tuple<Tensor, Tensor> loss_meta(const Tensor& scores, bool with_gradient) {
  return {at::empty({}, scores.options()),
          with_gradient ? at::empty_symint(scores.sym_sizes(), scores.options()) : at::empty({0}, scores.options())};
}

std::tuple<Tensor, Tensor> swapped_loss_meta(const Tensor& scores, const Tensor& log_targets, double temperature,
                                             bool with_gradient) {
  check_swapped_loss(scores, log_targets, temperature);
  return loss_meta(scores, with_gradient);
}

std::tuple<Tensor, Tensor> guided_loss_meta(const Tensor& scores, const Tensor& batch_scores, c10::SymInt first_row,
                                            double lambda1, double lambda2, int64_t prior_sign, c10::SymInt iters,
                                            PriorViews, double temperature, bool with_gradient) {
  check_guided_loss(scores, batch_scores, first_row, lambda1, lambda2, prior_sign, iters, temperature);
  return loss_meta(scores, with_gradient);
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd: no gradient flows through D, so each loss has one for its scores alone, formed in the forward pass
// ---------------------------------------------------------------------------------------------------------------------
// torch.func and forward mode refuse a Function written in C++; here is what to do instead.
void check_transforms(const Tensor& scores) {
  bool refused = scores._fw_grad(/*level=*/0).defined();
  try {
    if (const auto& torch_func = at::functorch::functorchTLSAccessor()) torch_func->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    refused = true;
  }
  TORCH_CHECK(!refused, "the compiled loss can't be differentiated by torch.func (grad, vjp, jvp, hessian ...) or in "
              "forward mode; call it with impl=\"reference\"");
}

// The gradient with its own dependence on the scores, for derivatives of any order: with t fixed (cpu_loss.cpp) it is
//   (sum(t) softmax(S / tau) - t) weight / tau
Tensor differentiable(const Tensor& gradient, const Tensor& scores, const Tensor& log_targets, int64_t assigning,
                      double temperature) {
  const int64_t G = scores.size(0), V = scores.size(1), m = scores.size(2), A = assigning;
  const Tensor sums = log_targets.defined() ? log_targets.exp().sum(-1, /*keepdim=*/true)  // [G, A, m, 1]
                                            : at::ones({G, A, m, 1}, scores.options());    // rows of D sum to 1
  const Tensor sum_t = sums.sum(1, true) - at::constant_pad_nd(sums, {0, 0, 0, 0, 0, V - A});  // [G, V, m, 1]
  const Tensor softmax = at::softmax(scores / temperature, -1);
  const double weight = 1 / static_cast<double>(G * m * A * (V - 1));
  return gradient + weight / temperature * sum_t * (softmax - softmax.detach());
}

class Loss : public torch::autograd::Function<Loss> {
 public:
  template <typename Run>
  static variable_list forward(AutogradContext* ctx, const Tensor& scores, const Tensor& targets, bool log_targets,
                               double temperature, const Run& run) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, gradient] = run(/*with_gradient=*/true);
    ctx->save_for_backward({gradient, scores, log_targets ? targets : Tensor()});
    ctx->saved_data["assigning"] = targets.sym_size(1);
    ctx->saved_data["temperature"] = temperature;
    ctx->mark_non_differentiable({gradient});
    return {loss, gradient};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outer) {
    const auto saved = ctx->get_saved_variables();
    Tensor gradient = saved[0];
    if (at::GradMode::is_enabled()) {
      gradient = differentiable(gradient, saved[1], saved[2],
                                ctx->saved_data["assigning"].toSymInt().guard_int(__FILE__, __LINE__),
                                ctx->saved_data["temperature"].toDouble());
    } else if (outer[0].device().is_cpu() && !at::isTensorSubclassLike(outer[0]) && outer[0].item<double>() == 1) {
      return {gradient, {}, {}, {}, {}};  // a loss of its own; on the CPU, where looking costs nothing, a pass is saved
    }
    return {gradient * outer[0], {}, {}, {}, {}};
  }
};

// run(with_gradient) -> loss, gradient. targets: log D where log_targets, else the scores of the assigning crops.
template <typename Run>
std::tuple<Tensor, Tensor> with_autograd(const Tensor& scores, const Tensor& targets, bool log_targets,
                                         double temperature, bool with_gradient, const Run& run) {
  check_transforms(scores);
  if (!at::GradMode::is_enabled() || !scores.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView below;
    return run(with_gradient);
  }
  const auto out = Loss::apply(scores, targets, log_targets, temperature, run);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> swapped_loss_autograd(const Tensor& scores, const Tensor& log_targets, double temperature,
                                                 bool with_gradient) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("goca::swapped_loss", "")
                       .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, bool)>();
  return with_autograd(scores, log_targets, true, temperature, with_gradient, [&](bool with_gradient) {
    return op.call(scores, log_targets, temperature, with_gradient);
  });
}

std::tuple<Tensor, Tensor> guided_loss_autograd(const Tensor& scores, const Tensor& batch_scores, c10::SymInt first_row,
                                                double lambda1, double lambda2, int64_t prior_sign, c10::SymInt iters,
                                                PriorViews prior_views, double temperature, bool with_gradient) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("goca::guided_loss", "")
                       .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, c10::SymInt, double, double,
                                                         int64_t, c10::SymInt, PriorViews, double, bool)>();
  return with_autograd(scores, batch_scores, false, temperature, with_gradient, [&](bool with_gradient) {
    return op.call(scores, batch_scores, first_row, lambda1, lambda2, prior_sign, iters, prior_views, temperature,
                   with_gradient);
  });
}

}  // namespace

TORCH_LIBRARY(goca, m) {
  m.def("assign(Tensor scores, Tensor? log_prior, float lambda1, float lambda2, int prior_sign, SymInt iters) "
        "-> Tensor");
  m.def("guided_assign(Tensor scores, float lambda1, float lambda2, int prior_sign, SymInt iters, bool[2] prior_views) "
        "-> Tensor");
  m.def("swapped_loss(Tensor scores, Tensor log_targets, float temperature, bool with_gradient=False) "
        "-> (Tensor loss, Tensor gradient)");
  m.def("guided_loss(Tensor scores, Tensor batch_scores, SymInt first_row, float lambda1, float lambda2, "
        "int prior_sign, SymInt iters, bool[2] prior_views, float temperature, bool with_gradient=False) "
        "-> (Tensor loss, Tensor gradient)");
}

#define REGISTER(key)                       \
  TORCH_LIBRARY_IMPL(goca, key, m) {        \
    m.impl("assign", assign);               \
    m.impl("guided_assign", guided_assign); \
    m.impl("swapped_loss", swapped_loss);   \
    m.impl("guided_loss", guided_loss);     \
  }
REGISTER(CPU)
#ifdef GOCA_CUDA
REGISTER(CUDA)
#endif

TORCH_LIBRARY_IMPL(goca, Meta, m) {
  m.impl("assign", assign_meta);
  m.impl("guided_assign", guided_assign_meta);
  m.impl("swapped_loss", swapped_loss_meta);
  m.impl("guided_loss", guided_loss_meta);
}

TORCH_LIBRARY_IMPL(goca, Autograd, m) {
  m.impl("assign", torch::CppFunction::makeFallthrough());  // assignments carry no gradient
  m.impl("guided_assign", torch::CppFunction::makeFallthrough());
  m.impl("swapped_loss", swapped_loss_autograd);
  m.impl("guided_loss", guided_loss_autograd);
}

}  // namespace goca

// An empty module: importing it runs the registrations above. `_goca.cuda` says whether the CUDA kernels are in.
PyMODINIT_FUNC PyInit__goca() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_goca", "Loads torch.ops.goca.", -1, nullptr};
  PyObject* m = PyModule_Create(&definition);
#ifdef GOCA_CUDA
  PyModule_AddObjectRef(m, "cuda", Py_True);
#else
  PyModule_AddObjectRef(m, "cuda", Py_False);
#endif
  return m;
}

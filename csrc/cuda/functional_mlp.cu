// Multilayer perceptrons of all tasks, layer by layer or, where they fit on chip, in one kernel; and the gradients.
#include "batched_gemm.h"
#include "column_sums.h"
#include "fused_mlp.h"

namespace fastmeta::cuda {
namespace {

// A row for each of all tasks' rows, where nothing but x differs between tasks.
void merge_tasks(FunctionalMlp& p) {
  bool shared = p.x_task != 0 || p.rows * p.widths[0] == 0;
  for (int64_t l = 0; l < p.layers; ++l)
    shared = shared && p.weight_task[l] == 0 && (!p.biases || p.bias_task[l] == 0);
  if (!shared || p.tasks == 1) return;
  p.rows *= p.tasks;
  p.tasks = 1;
}

const void* input_of(const FunctionalMlp& p, int64_t layer, void* const* hidden) {
  return layer == 0 ? p.x : hidden[layer - 1];
}
int64_t input_task(const FunctionalMlp& p, int64_t layer) { return layer == 0 ? p.x_task : p.rows * p.widths[layer]; }

template <class T>
void launch_layer(const FunctionalMlp& p, int64_t l, const void* input, void* out, void* pre, void* stream) {
  const int64_t inputs = p.widths[l], outputs = p.widths[l + 1];
  Gemm g{};
  g.a = input;
  g.b = p.weights[l];
  g.out = out;
  g.pre = pre;
  g.m = p.rows;
  g.n = outputs;
  g.k = g.k_total = inputs;
  g.steps = g.steps_each = g.groups = 1;
  g.batches = p.tasks;
  g.a_m = g.b_n = inputs;
  g.a_k = g.b_k = 1;
  g.a_batch = input_task(p, l);
  g.b_batch = p.weight_task[l];
  if (p.biases) {
    g.bias = p.biases[l];
    g.bias_batch = p.bias_task[l];
  }
  g.activation = l + 1 < p.layers ? p.activation : Activation::identity;
  launch_gemm<T>(g, stream);
}

// g.k terms of each of `tasks` tasks are summed into the one output of all. Where they lie one after the other, tasks
// do not matter and they are cut into even pieces.
template <class T>
void launch_sum_over_tasks(Gemm g, int64_t tasks, void* sums, void* stream) {
  constexpr int64_t kPiece = 512;
  g.k_total = g.k * tasks;
  const bool even = tasks == 1 || (g.a_step == g.k * g.a_k && (!g.b || g.b_step == g.k * g.b_k));
  if (even) {
    g.k = kPiece;
    g.a_step = kPiece * g.a_k;
    g.b_step = kPiece * g.b_k;
  }
  g.steps = g.k > 0 ? divide_up(g.k_total, g.k) : 0;
  g.steps_each = divide_up(g.steps > 0 ? g.steps : 1, most_splits(g.m * g.n));
  g.groups = g.steps > 0 ? divide_up(g.steps, g.steps_each) : 1;
  g.batches = 1;
  g.sums = sums;
  launch_gemm<T>(g, stream);
  if (g.groups > 1) launch_add_groups<T>(sums, 1, g.groups, g.m * g.n, g.out, stream);
}

// A gradient that is a sum over rows: of delta times input for weights, of delta alone (input nullptr) for biases.
template <class T>
void launch_parameter_gradient(const FunctionalMlp& p, const void* delta, int64_t outputs, const void* input,
                               int64_t inputs, int64_t input_stride, bool shared, void* out, void* sums, void* stream) {
  Gemm g{};
  g.a = delta;
  g.b = input;
  g.out = out;
  g.m = outputs;
  g.n = inputs;
  g.k = g.k_total = p.rows;
  g.steps = g.steps_each = g.groups = 1;
  g.batches = p.tasks;
  g.a_m = g.b_n = 1;
  g.a_k = outputs;
  g.b_k = inputs;
  g.a_step = g.a_batch = p.rows * outputs;
  g.b_step = g.b_batch = input_stride;
  if (shared || p.tasks == 1) return launch_sum_over_tasks<T>(g, p.tasks, sums, stream);
  launch_gemm<T>(g, stream);
}

// The gradient of a layer's input: of x, or, times the activation's derivative, the delta of the layer before.
template <class T>
void launch_input_gradient(const FunctionalMlpBwd& b, int64_t l, const void* delta, void* out, void* stream) {
  const FunctionalMlp& p = b.forward;
  const int64_t inputs = p.widths[l], outputs = p.widths[l + 1];
  Gemm g{};
  g.a = delta;
  g.b = p.weights[l];
  g.out = out;
  g.m = p.rows;
  g.n = inputs;
  g.k = g.k_total = outputs;
  g.steps = g.steps_each = g.groups = 1;
  g.batches = p.tasks;
  g.a_m = outputs;
  g.a_k = g.b_n = 1;
  g.b_k = inputs;
  g.a_step = g.a_batch = p.rows * outputs;
  g.b_step = g.b_batch = p.weight_task[l];
  if (l > 0) {
    g.activation = p.activation;
    g.value = derivative_needs_input(p.activation) ? b.pre[l - 1] : b.hidden[l - 1];
  } else if (p.x_task == 0 && p.tasks != 1) {
    return launch_sum_over_tasks<T>(g, p.tasks, b.sums, stream);
  }
  launch_gemm<T>(g, stream);
}

int64_t widest_hidden(const FunctionalMlp& p) {
  int64_t widest = 0;
  for (int64_t l = 1; l < p.layers; ++l) widest = p.widths[l] > widest ? p.widths[l] : widest;
  return widest;
}

}  // namespace

void launch_functional_mlp(Dtype dtype, FunctionalMlp p, void* out, void* scratch, void* stream) {
  merge_tasks(p);
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (fits_on_chip<T>(p)) return launch_fused_mlp<T>(p, static_cast<T*>(out), stream);
    T* halves[2] = {static_cast<T*>(scratch), static_cast<T*>(scratch) + p.tasks * p.rows * widest_hidden(p)};
    const void* input = p.x;
    for (int64_t l = 0; l < p.layers; ++l) {
      void* to = l + 1 < p.layers ? halves[l % 2] : out;
      launch_layer<T>(p, l, input, to, nullptr, stream);
      input = to;
    }
  });
}

void launch_functional_mlp_bwd(Dtype dtype, FunctionalMlpBwd b, void* stream) {
  merge_tasks(b.forward);
  const FunctionalMlp& p = b.forward;
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t l = 0; l + 1 < p.layers; ++l)
      launch_layer<T>(p, l, input_of(p, l, b.hidden), b.hidden[l],
                      derivative_needs_input(p.activation) ? b.pre[l] : nullptr, stream);
    T* halves[2] = {static_cast<T*>(b.deltas), static_cast<T*>(b.deltas) + p.tasks * p.rows * widest_hidden(p)};
    const void* delta = b.grad;
    for (int64_t l = p.layers - 1; l >= 0; --l) {
      const int64_t inputs = p.widths[l], outputs = p.widths[l + 1];
      if (b.d_weights)
        launch_parameter_gradient<T>(p, delta, outputs, input_of(p, l, b.hidden), inputs, input_task(p, l),
                                     p.weight_task[l] == 0, b.d_weights[l], b.sums, stream);
      if (b.d_biases)
        launch_parameter_gradient<T>(p, delta, outputs, nullptr, 1, 0, p.bias_task[l] == 0, b.d_biases[l], b.sums,
                                     stream);
      void* to = l > 0 ? halves[l % 2] : b.dx;
      if (to) launch_input_gradient<T>(b, l, delta, to, stream);
      delta = to;
    }
  });
}

}  // namespace fastmeta::cuda

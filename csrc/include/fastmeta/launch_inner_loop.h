// The launchers of the fused inner loops (adapt_mlp, meta_loss_mlp), free of torch as those of launch.h.
#pragma once

#include "launch.h"

namespace fastmeta::cuda {

// The numbers are those that Python hands over: never reorder.
enum class Loss : int { cross_entropy, mse, binary_cross_entropy, huber, maximum_entropy };
constexpr int kLossCount = 5;

constexpr int kInnerLayers = 16;  // as many as a kernel's arguments have room for

struct InnerInput {
  const void* data;
  int64_t task;  // elements from task to task, 0 where all share it
};
struct InnerOutput {
  void* data;    // nullptr: not wanted
  int64_t task;  // 0: the sum over all tasks
};

// Of the loss that couples a task's rows: demonstrations, each with its samples. `visits`: targets [rows,
// demonstrations, members] say how often a trajectory was in a row's state, the last row its log q; else a target is a
// trajectory's log q and the rows are the trajectories' states in order.
struct InnerPaths {
  int demonstrations, members, count;  // count: of trajectories
  bool visits;
};

struct InnerRows {
  const void* x;  // [tasks, rows, inputs]; Gram form: pre-activations of the first layer
  const void* gram;
  const void* target;     // or
  const int64_t* labels;  // of the cross entropy
  const void* weight;
  int rows;
  InnerPaths paths;
};

// Where rows at one layer's output lie, in elements from the start of the block's rows.
struct InnerPlaces {
  int value, slope, bend, delta, ld_delta;
};

struct InnerLayer {
  InnerInput weight, bias, weight_rate, bias_rate;
  void* fast_weight;  // adapt_mlp: the result [tasks, out, in], or its gradient when going backward
  void* fast_bias;
  InnerOutput d_weight, d_bias, d_weight_rate, d_bias_rate;
  int in, out;
  // the layout
  int columns, ldw, ld_in, at;  // weights and, in the column behind them, biases: [out, columns] from `at` in a state
  int rows;                     // there; more than `out` where zeros must follow
  InnerPlaces support, query;
  int dot_value, dot_delta;  // tangents of value and delta
  int turn;                  // threads by which its sums over rows are turned, to begin with idle warps
};

// One launch, as the kernel gets it. The caller fills in the first part, `plan_*` the second.
struct InnerLoop {
  int tasks, layers, steps;
  int first;   // the first layer with weights: 1 in the Gram form, else 0
  int biased;  // 0 or 1
  bool first_order, elementwise;
  Loss loss;
  Activation activation;
  double delta, momentum, weight_decay;
  InnerRows support, query;  // adapt_mlp: no query
  InnerInput rates;          // [steps, layers]
  InnerLayer layer[kInnerLayers];
  // results, or what came in going backward
  void* losses;
  void* logits;
  InnerInput grad_losses;  // given: going backward the losses' incoming gradient; losses and logits are results then
  void* coefficients;
  void* d_support_x;
  void* d_query_x;
  void* d_gram_support;
  void* d_gram_query;
  InnerOutput d_rates;

  int threads, chunk;  // chunk: query rows at once
  int processors;      // of the device
  int rows_on_chip, states_size, rows_size;
  int plain;           // W' = W - rate * gradient and nothing else
  int sweeps, curvature, wants_rates, keeps_moments;
  int state, first_state;  // elements of all weights; where in them the first layer's coefficients start
  int weights, adjoint, direction, moment_adjoint, moment;  // from the start of the block's states
  int x, ldx, query_x, ld_query_x, record, record_size, curve, dot_logits, sums, path_room;
  int64_t kept_states, kept_records, kept_moments, kept;  // in the block's scratch
  int64_t block_scratch, partials;                        // elements of each block
  void* scratch;
  void* weight_sums;  // the first block's sum of gradients of shared weights, as a state has them; or nullptr
};
static_assert(sizeof(InnerLoop) <= 4096, "a kernel's arguments");

struct InnerPlan {
  int64_t blocks, scratch;  // scratch: elements, in the dtype of the tensors
  int64_t block_elements;   // of a block's memory; must be an int
  size_t shared;            // bytes of a block
  bool on_chip;             // states too
};

InnerPlan plan_adapt_mlp(Dtype dtype, InnerLoop& p, bool backward);
void launch_adapt_mlp(Dtype dtype, InnerLoop p, const InnerPlan& plan, bool backward, void* scratch, void* stream);
InnerPlan plan_meta_loss_mlp(Dtype dtype, InnerLoop& p, bool backward);
void launch_meta_loss_mlp(Dtype dtype, InnerLoop p, const InnerPlan& plan, bool backward, void* scratch, void* stream);

}  // namespace fastmeta::cuda

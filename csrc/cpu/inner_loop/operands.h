// What the fused inner loops (adapt_mlp, meta_loss_mlp) hand to a kernel: plain pointers, a range of tasks at a time.
#pragma once

#include <stdint.h>

namespace fastmeta::cpu {

enum Loss : int64_t { kCrossEntropy, kMse, kBinaryCrossEntropy, kHuber, kMaximumEntropy, kLosses };

// Each task's part of an input; a step of 0: shared by all tasks.
template <class E>
struct Operand {
  const E* base = nullptr;
  int64_t step = 0;
};

// Each task's part of an output. Gradients of shared inputs are sums: one for each group of tasks, added to.
template <class T>
struct Target {
  T* base = nullptr;  // null: not needed
  int64_t step = 0;
  int64_t group_step = 0;
  bool sum = false;
};

constexpr int64_t kMostInnerLayers = 32;

// Of the loss that couples a task's rows: demonstrations, each with its samples. `visits`: targets say how often a
// trajectory was in each row's state, `[rows, demonstrations, members]`, the last row its log q; else a target is a
// trajectory's log q and the rows are the trajectories' states in order.
struct Paths {
  int64_t demonstrations = 0, members = 0;
  bool visits = false;
  int64_t count() const { return demonstrations * members; }
};

template <class T>
struct Rows {
  int64_t count = 0;
  Operand<T> x;  // Gram form: pre-activations of the first layer
  Operand<T> gram;
  Operand<T> target;
  Operand<int64_t> labels;
  Operand<T> weight;
  Paths paths;
};

template <class T>
struct InnerLoop {
  int64_t layers;  // the first one too in the Gram form
  int64_t widths[kMostInnerLayers + 1];  // in the Gram form widths[0] is 0
  bool gram, biased, first_order;
  int64_t steps, loss, activation;
  int64_t tasks_each;  // of a range, at least
  T delta, momentum, weight_decay;
  Rows<T> support, query;  // adapt_mlp: no query
  Operand<T> weights[kMostInnerLayers], biases[kMostInnerLayers];  // by layer; in the Gram form not [0]
  Operand<T> rates;  // [steps, layers]
  bool elementwise;
  Operand<T> weight_rates[kMostInnerLayers], bias_rates[kMostInnerLayers];

  bool query_pass;  // meta_loss_mlp
  // forward, and with its gradient at once
  T* loss_out;
  T* logits_out;
  Target<T> fast_weights[kMostInnerLayers], fast_biases[kMostInnerLayers], coefficients;
  // backward: incoming
  Operand<T> grad_loss;
  const T* grad_logits;  // null: none
  Operand<T> grad_weights[kMostInnerLayers], grad_biases[kMostInnerLayers], grad_coefficients;
  // backward: outgoing
  Target<T> d_support_x, d_query_x, d_gram_support, d_gram_query, d_rates;
  Target<T> d_weights[kMostInnerLayers], d_biases[kMostInnerLayers];
  Target<T> d_weight_rates[kMostInnerLayers], d_bias_rates[kMostInnerLayers];
};

}  // namespace fastmeta::cpu

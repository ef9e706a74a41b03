// The launchers of the CUDA kernels, free of torch: what the bridges (csrc/cuda/*_torch.cpp) call. All pointers are
// device pointers to contiguous arrays; `stream` is a cudaStream_t. A launcher starts kernels and returns.
#pragma once

#include <cstdint>

#include "activations.h"
#include "metrics.h"

namespace fastmeta::cuda {

enum class Dtype : int { f32, f64, f16, bf16 };

// The sentence of the last launch's error on this thread, or nullptr.
const char* last_error();

// class_prototypes: x [tasks, support, width], labels [tasks, support], out [tasks, classes, width]
struct ClassPrototypes {
  const void* x;
  const int64_t* labels;
  void* out;
  int64_t tasks, support, classes, width;
};
void launch_class_prototypes(Dtype dtype, const ClassPrototypes& p, void* stream);
// x is the gradient [tasks, classes, width], out [tasks, support, width]
void launch_class_prototypes_bwd(Dtype dtype, const ClassPrototypes& p, void* stream);

// pairwise_distance: out [tasks, rows, classes]
struct PairwiseDistance {
  const void* query;
  const void* prototypes;
  void* out;
  int64_t tasks, rows, classes, width;
  Metric metric;
};
void launch_pairwise_distance(Dtype dtype, const PairwiseDistance& p, void* stream);

// What the gradient of a distance needs beyond its inputs, in the accumulation type (float for halves).
struct Coefficients {
  void* pair;        // [tasks, rows, classes]: factor of the other operand, or of the difference
  void* self;        // cosine: [tasks, rows, classes], summed into the factor of the operand itself
  void* query;       // cosine: [tasks, rows], 1 / |query|^2
  void* prototypes;  // cosine: [tasks, classes]
};
// Whether a gradient handed in as `grad` must be turned into Coefficients first.
inline bool needs_coefficients(Metric metric) { return metric == Metric::euclidean || metric == Metric::cosine; }

struct PairwiseDistanceBwd {
  PairwiseDistance forward;  // `out` is not used
  const void* grad;          // [tasks, rows, classes]; nullptr: the coefficients are there already
  Coefficients coefficients;
  void* d_query;       // or nullptr
  void* d_prototypes;  // or nullptr
};
void launch_pairwise_distance_bwd(Dtype dtype, const PairwiseDistanceBwd& p, void* stream);

// prototypical_loss: loss and accuracy [tasks]
struct PrototypicalLoss {
  const void* support;
  const int64_t* support_labels;
  const void* query;
  const int64_t* query_labels;
  int64_t tasks, support_rows, rows, classes, width;
  Metric metric;
  void* prototypes;  // scratch [tasks, classes, width]
  void* sums;        // scratch [tasks, query_tiles(rows), 2], accumulation type
  void* loss;
  void* accuracy;
};
constexpr int64_t kQueryTile = 64;
inline int64_t query_tiles(int64_t rows) { return (rows + kQueryTile - 1) / kQueryTile; }
void launch_prototypical_loss(Dtype dtype, const PrototypicalLoss& p, void* stream);

struct PrototypicalLossBwd {
  PrototypicalLoss forward;  // `sums`, `loss` and `accuracy` are not used
  const void* grad_loss;     // [tasks]
  void* log_sums;            // scratch [tasks, rows, 2]: largest -distance and log of the sum, accumulation type
  Coefficients coefficients;  // scratch for `chunk` tasks at a time, so that nothing grows as [tasks, rows, classes]
  int64_t chunk;
  void* d_prototypes;  // scratch [tasks, classes, width], where d_support is wanted
  void* d_support;     // or nullptr
  void* d_query;       // or nullptr
};
void launch_prototypical_loss_bwd(Dtype dtype, const PrototypicalLossBwd& p, void* stream);

// fast_weight_update and its gradients are all of one form: out = addend - a * b, maybe summed.
struct Strided {
  const void* data;     // nullptr: 0 as `addend`, the `number` of the launch as `b`
  int64_t row, column;  // element (t, i) is at t * row + i * column; a stride of 0 repeats
};
enum class Reduce : int { none, rows, columns, all };  // what is summed over; then there is no addend
struct Product {
  Strided addend, a, b;
  void* out;
  int64_t rows, columns;
  Reduce reduce;
};
constexpr int64_t kMostSums = 256;  // into how many sums the rows are split at most
inline int64_t sum_length(int64_t rows) {  // how many rows a sum has
  const int64_t even = (rows + kMostSums - 1) / kMostSums;
  return even < 64 ? 64 : even;
}
inline int64_t sum_count(int64_t rows) { return rows > 0 ? (rows + sum_length(rows) - 1) / sum_length(rows) : 1; }
// Elements of scratch, in the accumulation type; one scratch of the largest size serves a whole launch.
inline int64_t product_scratch(const Product& p) {
  return p.reduce == Reduce::rows ? sum_count(p.rows) * p.columns : p.reduce == Reduce::all ? sum_count(p.rows) : 0;
}
void launch_products(Dtype dtype, const Product* products, int64_t count, double number, void* scratch, void* stream);

// Steps of optimisers and their gradients: results made of operands, all elementwise. Operands come in the order of the
// op's lists, behind them for a gradient those of the outputs; results are the outputs, or the gradients of the lists.
enum class Step : int { sgd, sgd_gradient, adam, adam_gradient };
constexpr int kStepOperands = 14, kStepResults = 10;
struct StepFlags {
  bool first, second;  // as the op has them
  bool decays;         // false: there is no decay
};
struct StepTensor {
  const void* operands[kStepOperands];  // nullptr: the number of that place
  void* results[kStepResults];          // [rows, columns]; nullptr: not wanted
  int64_t rows, columns;
  bool repeats_rows[kStepOperands], repeats_columns[kStepOperands];
  bool raw[kStepResults];  // in the accumulation type, to be summed afterwards
};
void launch_step(Dtype dtype, Step step, const StepTensor* tensors, int64_t count, const double* numbers,
                 StepFlags flags, void* stream);
// A raw result [rows, columns] summed over what its operand repeats along. scratch: rows, in the accumulation type.
void launch_step_sum(Dtype dtype, const void* raw, int64_t rows, int64_t columns, bool over_rows, bool over_columns,
                     void* scratch, void* out, void* stream);

// functional_mlp: arrays of `layers` (widths: layers + 1) elements on the host, of pointers to the device
struct FunctionalMlp {
  int64_t tasks, rows, layers;
  const int64_t* widths;
  Activation activation;
  const void* x;
  int64_t x_task;  // elements from task to task, 0 where all share it; so below
  const void* const* weights;
  const int64_t* weight_task;
  const void* const* biases;  // nullptr: none
  const int64_t* bias_task;
};
// scratch: 2 * tasks * rows * widest hidden layer
void launch_functional_mlp(Dtype dtype, FunctionalMlp p, void* out, void* scratch, void* stream);

struct FunctionalMlpBwd {
  FunctionalMlp forward;
  const void* grad;
  void* const* hidden;  // scratch per hidden layer, tasks * rows * width: its values
  void* const* pre;     // likewise its pre-activations, where derivative_needs_input
  void* deltas;         // scratch: 2 * tasks * rows * widest hidden layer
  void* sums;           // scratch in the accumulation type: the most of `split_scratch` over the gradients
  void* dx;             // or nullptr, as below
  void* const* d_weights;
  void* const* d_biases;
};
void launch_functional_mlp_bwd(Dtype dtype, FunctionalMlpBwd b, void* stream);

// Into how many sums the gradient of a shared tensor is split, so that one small tensor keeps many blocks busy.
inline int64_t most_splits(int64_t size) {
  const int64_t room = (int64_t(1) << 22) / (size > 0 ? size : 1);
  return room < 1 ? 1 : room > 64 ? 64 : room;
}
inline int64_t split_scratch(int64_t size) { return size * most_splits(size); }

}  // namespace fastmeta::cuda

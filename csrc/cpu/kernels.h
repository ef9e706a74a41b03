// What an instruction set offers: one table of functions per scalar type, and the plain arguments they take.
//
// Arguments hold no tensors: the torch side (csrc/cpu/<op>.cpp) allocates and splits the work, a kernel
// (csrc/cpu/<op>_kernel.h) does one item of it with scratch of its own thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "conv/geometry.h"
#include "inner_loop/operands.h"

namespace fastmeta::cpu {

enum Metric : int64_t { kSqeuclidean, kEuclidean, kCosine, kDot, kManhattan, kMetrics };
enum Activation : int64_t { kIdentity, kRelu, kTanh, kSigmoid, kSilu, kGelu, kSine, kActivations };

// 64-byte aligned memory of the calling thread, valid until its next call; grows, and stays for the next op.
void* thread_scratch(size_t bytes);

// One tensor of `fast_weight_update`, rows [begin_row, end_row) by columns [begin, end). A stride of 0 repeats.
template <class T>
struct UpdateItem {
  const T* param;
  const T* grad;
  const T* lr;  // null: `rate`
  T rate;
  int64_t param_row, grad_row, lr_row;
  bool param_column, grad_column, lr_column;  // false: one number for all columns
  T* out;
  int64_t out_row;
  int64_t rows, columns;
};

// The backward of the same: d_grad = -lr * out_grad, d_lr = -out_grad * grad, summed over the rows of the item where
// their row stride is 0, over its columns where the column is false. Null where not needed.
template <class T>
struct UpdateGradientItem {
  const T* out_grad;
  int64_t out_row;
  const T* grad;
  const T* lr;
  T rate;
  int64_t grad_row, lr_row;
  bool grad_column, lr_column;
  T* d_grad;
  T* d_lr;
  int64_t d_grad_row, d_lr_row;  // 0: summed over the rows of this item
  int64_t rows, columns;
};

// A block of one tensor in an optimiser's step: operands and results by number, as optimizer_steps_kernel.h has them.
// A row stride of 0 repeats an operand, and sums a result over the rows of the block.
template <class T>
struct StepItem {
  struct {
    const T* data;
    int64_t row;
    bool columns;  // false: one number for a row
  } operands[14];
  struct {
    T* data;  // null: not needed
    int64_t row;
    bool columns;  // false: summed over the columns
  } results[10];
  int64_t rows, columns;
  bool first_flag, second_flag;  // as the op has them
  bool decays;                   // false: there is no decay
};

// One task, or a range of its columns: x [support, width], row stride ld.
template <class T>
struct PrototypeItem {
  const T* x;  // embeddings, or the gradient of the prototypes in the backward
  const int64_t* labels;
  int64_t support, classes, width, ld;
  T* out;
};

// Queries [rows, width] of one task against its prototypes [classes, width].
template <class T>
struct DistanceItem {
  const T* query;
  const T* prototypes;
  int64_t rows, classes, width;
  int64_t metric;
  T* out;  // [rows, classes]
  const T* grad;  // backward: [rows, classes]
  T* d_query;  // null: not needed
  T* d_prototypes;  // null: not needed; written, not added to
};

// One task with a range of its queries.
template <class T>
struct LossItem {
  const T* support;
  const int64_t* support_labels;
  const T* query;
  const int64_t* query_labels;
  int64_t support_rows, query_rows, classes, width;
  int64_t metric;
  T* loss;      // sums over this item's queries; backward: null where not wanted
  T* accuracy;
  T grad;  // backward: of the sum of losses
  T* d_query;
  T* d_prototypes;  // [classes, width] partial sum of this item; null: spread to d_support here
  T* d_support;
};

constexpr int64_t kContrastColumns = 240;  // of a tile of scores: whole panels of every vector width

// Rows [begin, end) of one task's embeddings [count, width] against all of them.
template <class T>
struct ContrastItem {
  const T* embeddings;
  const T* packed;  // transposed in panels, kContrastColumns at a time
  int64_t count, width, begin, end;
  T scale;      // of the products: 1 / temperature
  T* log_sums;  // [count]: written forward, read backward
  T* loss;      // sum over these rows
  T factor;     // backward: of the sum of losses, times scale
  T* d_embeddings;
};

constexpr int64_t kMaxLayers = 64;

// Rows [first_row, first_row + rows) of one task through a net. Pointers are of this task.
template <class T>
struct MlpItem {
  int64_t layers;
  const int64_t* widths;  // layers + 1
  int64_t activation;
  int64_t rows;
  const T* x;
  const T* const* weights;
  const T* const* biases;  // null: none
  T* out;
  const T* grad;  // backward: [rows, last width]
  T* dx;  // null: not needed
  bool add_dx;
  T* const* d_weights;  // null: not needed
  T* const* d_biases;
  const bool* add_weights;  // per layer: += instead of =
  const bool* add_biases;
};

// `count` tasks with all their rows, forward.
template <class T>
struct MlpPack {
  int64_t layers;
  const int64_t* widths;  // layers + 1
  int64_t activation, rows, count;
  Operand<T> x, weights[kMaxLayers], biases[kMaxLayers];  // of the first task
  T* out;
  int64_t out_step;
};

enum Norm : int64_t { kNoNorm, kBatchNorm, kGroupNorm, kGivenNorm };
enum Pool : int64_t { kNoPool, kMaxPool, kAveragePool };

constexpr int64_t kMomentPixels = 64;  // that are read twice, from the first-level cache
// Of the pixels [pixels, channels]: mean less the first pixel where that is finite, and sum of squares about the mean.
template <class T>
struct MomentsBlock {
  const T* x;
  int64_t pixels, channels;
  T *mean, *squares;
};

// Lines [first, last) of images [..., height, width, channels] that share their tables; a line is a row of outputs.
template <class T>
struct NormBlock {
  int64_t height, width, channels, padded;  // padded: row stride of tables and sums, whole vectors
  int64_t first, last;
  int64_t activation, pool;
  T slope;
  bool constant;  // mean and variance are no functions of x
  const T* x;
  const T* tables;  // by channel, see the kernels
  const T* grad;    // of the outputs
  const T* outer;   // second derivative: gradient of d_x; null: 0
  T* sums;          // by channel; added to
  T* out;           // outputs, or the gradient of x
  T* d_grad;        // second derivative; null: not needed
};

template <class T>
struct Kernels {
  void (*update)(const UpdateItem<T>&);
  void (*update_gradient)(const UpdateGradientItem<T>&);
  void (*sgd_step)(const StepItem<T>&);
  void (*sgd_step_gradient)(const StepItem<T>&);
  void (*adam_step)(const StepItem<T>&);
  void (*adam_step_gradient)(const StepItem<T>&);
  void (*prototypes)(const PrototypeItem<T>&);
  void (*prototypes_gradient)(const PrototypeItem<T>&);
  void (*distances)(const DistanceItem<T>&);
  void (*distances_gradient)(const DistanceItem<T>&);
  void (*loss)(const LossItem<T>&);
  void (*loss_gradient)(const LossItem<T>&);
  void (*mlp)(const MlpItem<T>&);
  void (*mlp_gradient)(const MlpItem<T>&);
  int64_t (*mlp_lanes)(const int64_t* widths, int64_t layers, int64_t rows);
  void (*mlp_pack)(const MlpPack<T>&);
  void (*contrast)(const ContrastItem<T>&);
  void (*contrast_gradient)(const ContrastItem<T>&);
  void (*pack)(int64_t columns, int64_t depth, const T* from, int64_t ld, T* to);
  void (*sum_partials)(const T* from, int64_t parts, int64_t part_stride, T* to, int64_t n);
  void (*norm_moments)(const MomentsBlock<T>&);
  void (*norm_forward)(const NormBlock<T>&);
  void (*norm_sums)(const NormBlock<T>&);
  void (*norm_gradient)(const NormBlock<T>&);
  void (*norm_second_sums)(const NormBlock<T>&);
  void (*norm_second)(const NormBlock<T>&);
  void (*inner_loop)(const InnerLoop<T>&, int64_t begin, int64_t end, int64_t group);
  void (*inner_loop_gradient)(const InnerLoop<T>&, int64_t begin, int64_t end, int64_t group);
  void (*conv)(const ConvItem<T>&);
  void (*conv_weight)(const ConvWeightItem<T>&);
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

// The tables that were built, and the one in use: the best this processor has, or a lower one by FASTMETA_CPU_ISA.
extern const Isa kBaseline;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTMETA_X86 1
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif
const Isa& isa();
// For matrices of these widths, [inputs, outputs] by layer: `isa()`, or AVX2 where AVX-512 would do no more per cycle
// and pad its longer vectors.
const Isa& isa_for(const int64_t* widths, int64_t layers, int64_t number_bytes);

}  // namespace fastmeta::cpu

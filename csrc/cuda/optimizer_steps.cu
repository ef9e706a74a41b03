// Steps of SGD and Adam over many tensors, and their gradients: one launch for every kCapacity tensors.
#include "column_sums.h"

namespace fastmeta::cuda {
namespace {

constexpr int kThreads = 256, kEach = 2, kBlock = kThreads * kEach;
constexpr int kCapacity = 13;  // what fits into the 4 KiB of a kernel's arguments

struct Batch {
  StepTensor tensors[kCapacity];
  int64_t first_block[kCapacity + 1];  // tensor i has the blocks from first_block[i] to first_block[i + 1]
  double inverse[kCapacity];           // 1 / columns
  double numbers[kStepOperands];
  StepFlags flags;
  int count;
};
static_assert(sizeof(Batch) <= 4000, "a kernel takes 4 KiB of arguments");

// Row of an element without a 64-bit division: the quotient is off by one at most below 2^53.
__device__ __forceinline__ int64_t row_of(int64_t index, int64_t columns, double inverse) {
  int64_t row = int64_t(double(index) * inverse);
  if (row * columns > index) --row;
  if ((row + 1) * columns <= index) ++row;
  return row;
}

template <class A>
__device__ __forceinline__ A root_of(A square, A least) {
  return sqrt(square < least ? least : square);  // in this order NaN stays NaN
}

// operands: params, grads, buffers, rates, momenta, shares, decays; gradients of moved and buffers
template <class A>
struct SgdRule {
  static constexpr int kOperands = 7, kResults = 2;

  __device__ __forceinline__ static void run(const A* in, A* out, StepFlags flags) {
    const A g = flags.decays ? in[1] + in[6] * in[0] : in[1];
    const A buffer = in[5] * g + in[4] * in[2];
    out[0] = in[0] - in[3] * (flags.first ? g + in[4] * buffer : buffer);
    out[1] = buffer;
  }
};

template <class A>
struct SgdGradientRule {
  static constexpr int kOperands = 9, kResults = 7;

  __device__ __forceinline__ static void run(const A* in, A* out, StepFlags flags) {
    const A p = in[0], old = in[2], rate = in[3], momentum = in[4], share = in[5], decay = in[6], d_moved = in[7];
    const bool nesterov = flags.first;
    const A g = flags.decays ? in[1] + decay * p : in[1];
    const A buffer = share * g + momentum * old;
    const A along = nesterov ? g + momentum * buffer : buffer;
    const A d_along = -rate * d_moved;
    const A d_buffer = in[8] + (nesterov ? momentum * d_along : d_along);
    const A d_g = share * d_buffer + (nesterov ? d_along : A(0));
    out[0] = flags.decays ? d_moved + decay * d_g : d_moved;
    out[1] = d_g;
    out[2] = momentum * d_buffer;
    out[3] = -d_moved * along;
    out[4] = d_buffer * old + (nesterov ? d_along * buffer : A(0));
    out[5] = d_buffer * g;
    out[6] = d_g * p;
  }
};

// operands: params, grads, means, squares, maxima, rates, shares1, shares2, epsilons, decays; gradients of the outputs
template <class A>
struct AdamStep {
  A g, mean, square, largest, root;
  static constexpr A kLeast = sizeof(A) == 4 ? A(1.17549435e-38f) : A(2.2250738585072014e-308);  // that is normal

  __device__ __forceinline__ AdamStep(const A* in, StepFlags flags) {
    g = flags.decays && !flags.first ? in[1] + in[9] * in[0] : in[1];
    mean = in[2] + in[6] * (g - in[2]);
    square = in[3] + in[7] * (g * g - in[3]);
    largest = flags.second && (in[4] > square || in[4] != in[4]) ? in[4] : square;
    root = root_of(largest, kLeast);
  }
};

template <class A>
struct AdamRule {
  static constexpr int kOperands = 10, kResults = 4;

  __device__ __forceinline__ static void run(const A* in, A* out, StepFlags flags) {
    const AdamStep<A> step(in, flags);
    const A start = flags.decays && flags.first ? in[0] - in[9] * in[0] : in[0];
    out[0] = start - in[5] * (step.mean / (step.root + in[8]));
    out[1] = step.mean;
    out[2] = step.square;
    out[3] = step.largest;
  }
};

template <class A>
struct AdamGradientRule {
  static constexpr int kOperands = 14, kResults = 10;

  __device__ __forceinline__ static void run(const A* in, A* out, StepFlags flags) {
    const bool decoupled = flags.first, amsgrad = flags.second;
    const AdamStep<A> step(in, flags);
    const A p = in[0], rate = in[5], share1 = in[6], share2 = in[7], decay = in[9], d_moved = in[10], g = step.g;
    const A inverse = A(1) / (step.root + in[8]);
    const A along = step.mean * inverse, d_along = -rate * d_moved * inverse;  // of the mean
    const A d_mean = in[11] + d_along;
    const A d_below = -d_along * along;  // of root + eps
    // at 0 the root's slope counts as 0: what it would multiply is
    const A slope = step.largest < AdamStep<A>::kLeast ? A(0) : A(0.5) / step.root;
    const A d_largest = d_below * slope + (amsgrad ? in[13] : A(0));
    A d_maximum = 0, d_square = d_largest;
    if (amsgrad) {  // a tie counts half for each, as in torch
      d_maximum = in[4] > step.square ? d_largest : in[4] == step.square ? A(0.5) * d_largest : A(0);
      d_square = in[4] > step.square ? A(0) : in[4] == step.square ? A(0.5) * d_largest : d_largest;
    }
    d_square += in[12];
    const A d_g = share1 * d_mean + A(2) * share2 * g * d_square;
    out[0] = !flags.decays ? d_moved : decoupled ? d_moved - decay * d_moved : d_moved + decay * d_g;
    out[1] = d_g;
    out[2] = d_mean - share1 * d_mean;
    out[3] = d_square - share2 * d_square;
    out[4] = d_maximum;
    out[5] = -d_moved * along;
    out[6] = d_mean * (g - in[2]);
    out[7] = d_square * (g * g - in[3]);
    out[8] = d_below;
    out[9] = decoupled ? -d_moved * p : d_g * p;
  }
};

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads) steps_kernel(Batch batch) {
  using A = Acc<T>;
  FM_EACH(block, x, batch.first_block[batch.count]) {
    int i = 0;
    while (block >= batch.first_block[i + 1]) ++i;
    const StepTensor& t = batch.tensors[i];
    const int64_t start = (block - batch.first_block[i]) * kBlock + threadIdx.x, size = t.rows * t.columns;
    for (int j = 0; j < kEach; ++j) {
      const int64_t index = start + j * kThreads;
      if (index >= size) continue;
      const int64_t row = t.rows == 1 ? 0 : row_of(index, t.columns, batch.inverse[i]);
      const int64_t column = index - row * t.columns;
      A in[Rule::kOperands], out[Rule::kResults];
#pragma unroll
      for (int k = 0; k < Rule::kOperands; ++k) {
        const T* from = static_cast<const T*>(t.operands[k]);
        const int64_t width = t.repeats_columns[k] ? 1 : t.columns;
        const int64_t at = (t.repeats_rows[k] ? 0 : row * width) + (t.repeats_columns[k] ? 0 : column);
        in[k] = from ? load(from + at) : A(batch.numbers[k]);
      }
      Rule::run(in, out, batch.flags);
#pragma unroll
      for (int k = 0; k < Rule::kResults; ++k) {
        if (!t.results[k]) continue;
        if (t.raw[k])
          static_cast<A*>(t.results[k])[index] = out[k];
        else
          store(static_cast<T*>(t.results[k]) + index, out[k]);
      }
    }
  }
}

// Tasks and columns are one long row where every operand is whole or a single number.
StepTensor flattened(StepTensor t) {
  for (int k = 0; k < kStepOperands; ++k)
    if (t.operands[k] && t.repeats_rows[k] != t.repeats_columns[k]) return t;
  t.columns *= t.rows;
  t.rows = 1;
  return t;
}

}  // namespace

void launch_step(Dtype dtype, Step step, const StepTensor* tensors, int64_t count, const double* numbers,
                 StepFlags flags, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    Batch batch{};
    batch.flags = flags;
    for (int k = 0; k < kStepOperands; ++k) batch.numbers[k] = numbers[k];
    const auto flush = [&] {
      const Grid grid{batch.first_block[batch.count]};
      switch (step) {
        case Step::sgd: launch(steps_kernel<T, SgdRule<A>>, grid, kThreads, 0, stream, batch); break;
        case Step::sgd_gradient: launch(steps_kernel<T, SgdGradientRule<A>>, grid, kThreads, 0, stream, batch); break;
        case Step::adam: launch(steps_kernel<T, AdamRule<A>>, grid, kThreads, 0, stream, batch); break;
        case Step::adam_gradient: launch(steps_kernel<T, AdamGradientRule<A>>, grid, kThreads, 0, stream, batch); break;
      }
      batch.count = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      const StepTensor t = flattened(tensors[i]);
      if (t.rows * t.columns == 0) continue;
      if (batch.count == kCapacity) flush();
      batch.tensors[batch.count] = t;
      batch.inverse[batch.count] = 1.0 / double(t.columns);
      batch.first_block[batch.count + 1] =
          batch.first_block[batch.count] + divide_up<int64_t>(t.rows * t.columns, kBlock);
      ++batch.count;
    }
    flush();
  });
}

void launch_step_sum(Dtype dtype, const void* raw, int64_t rows, int64_t columns, bool over_rows, bool over_columns,
                     void* scratch, void* out, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!over_columns) return launch_add_groups<T>(raw, 1, rows, columns, out, stream);
    if (!over_rows) return launch_add_groups<T>(raw, rows, columns, 1, out, stream);
    launch_add_groups<Acc<T>>(raw, rows, columns, 1, scratch, stream);
    launch_add_groups<T>(scratch, 1, rows, 1, out, stream);
  });
}

}  // namespace fastmeta::cuda

// Steps of SGD and Adam for a block of one tensor, and their gradients. Bound by memory: one pass, whole vectors.
//
// A rule makes results from operands, a vector of each at a time; the walk over rows and columns is the same for all.
// Operands come in the order of the op's lists; behind them, for a gradient, those of the outputs. Results of a step
// are the op's outputs, of a gradient the gradients of its lists.
#pragma once

#include <fastmeta/simd.h>

#include "kernels.h"

namespace fastmeta::FASTMETA_ISA {

template <class T, class Rule>
void optimizer_step(const cpu::StepItem<T>& item) {
  constexpr int W = kWidth<T>, kOperands = Rule::kOperands, kResults = Rule::kResults;
  const int64_t whole = item.columns / W * W, rest = item.columns - whole;
  const Rule rule{item.first_flag, item.second_flag, item.decays};
  alignas(64) T numbers[kOperands][W];  // an operand with one number for a row is a vector of it, read with step 0
  for (int64_t r = 0; r < item.rows; ++r) {
    const T* from[kOperands];
    int64_t step[kOperands];
    for (int k = 0; k < kOperands; ++k) {
      const auto& operand = item.operands[k];
      from[k] = operand.data + r * operand.row;
      step[k] = operand.columns;
      if (operand.columns) continue;
      store(numbers[k], broadcast(*from[k]));
      from[k] = numbers[k];
    }
    Vec<T> sums[kResults] = {};
    const auto take = [&](int k, int64_t j, Vec<T> value, int64_t lanes) __attribute__((always_inline)) {
      const auto& result = item.results[k];
      if (!result.data) return;
      if (!result.columns) {
        sums[k] += lanes == W ? value : load_first(reinterpret_cast<const T*>(&value), lanes);
        return;
      }
      T* to = result.data + r * result.row + j;
      if (result.row == 0 && r > 0) value += lanes == W ? load(to) : load_first(static_cast<const T*>(to), lanes);
      lanes == W ? store(to, value) : store_first(to, value, lanes);
    };
    Vec<T> in[kOperands], out[kResults];
    for (int64_t j = 0; j < whole; j += W) {
      FM_UNROLL for (int k = 0; k < kOperands; ++k) in[k] = load(from[k] + j * step[k]);
      rule(in, out);
      FM_UNROLL for (int k = 0; k < kResults; ++k) take(k, j, out[k], W);
    }
    if (rest) {
      FM_UNROLL for (int k = 0; k < kOperands; ++k) in[k] = load_first(from[k] + whole * step[k], rest);
      rule(in, out);
      FM_UNROLL for (int k = 0; k < kResults; ++k) take(k, whole, out[k], rest);
    }
    for (int k = 0; k < kResults; ++k) {
      const auto& result = item.results[k];
      if (!result.data || result.columns) continue;
      T* to = result.data + r * result.row;
      *to = (result.row == 0 && r > 0 ? *to : 0) + sum_of_lanes<T>(sums[k]);
    }
  }
}

// operands: params, grads, buffers, rates, momenta, shares, decays; gradients of moved and buffers
struct SgdRule {
  static constexpr int kOperands = 7, kResults = 2;
  bool nesterov, keeps, decays;

  template <class V>
  FM_INLINE void operator()(const V* in, V* out) const {
    const V g = decays ? in[1] + in[6] * in[0] : in[1];
    const V buffer = in[5] * g + in[4] * in[2];
    out[0] = in[0] - in[3] * (nesterov ? g + in[4] * buffer : buffer);
    out[1] = buffer;
  }
};

struct SgdGradientRule {
  static constexpr int kOperands = 9, kResults = 7;
  bool nesterov, keeps, decays;

  template <class V>
  FM_INLINE void operator()(const V* in, V* out) const {
    const V p = in[0], old = in[2], rate = in[3], momentum = in[4], share = in[5], decay = in[6], d_moved = in[7];
    const V g = decays ? in[1] + decay * p : in[1];
    const V buffer = share * g + momentum * old;
    const V along = nesterov ? g + momentum * buffer : buffer;
    const V d_along = -rate * d_moved;
    const V d_buffer = in[8] + (nesterov ? momentum * d_along : d_along);
    const V d_g = share * d_buffer + (nesterov ? d_along : V{});
    out[0] = decays ? d_moved + decay * d_g : d_moved;
    out[1] = d_g;
    out[2] = momentum * d_buffer;
    out[3] = -d_moved * along;
    out[4] = d_buffer * old + (nesterov ? d_along * buffer : V{});
    out[5] = d_buffer * g;
    out[6] = d_g * p;
  }
};

// What a step of Adam goes through, forward.
// operands: params, grads, means, squares, maxima, rates, shares1, shares2, epsilons, decays; gradients of the outputs
template <class V, class T>
struct AdamStep {
  V g, mean, square, largest, root;

  FM_INLINE AdamStep(const V* in, bool decoupled, bool amsgrad, bool decays) {
    g = decays && !decoupled ? in[1] + in[9] * in[0] : in[1];
    mean = in[2] + in[6] * (g - in[2]);
    square = in[3] + in[7] * (g * g - in[3]);
    largest = amsgrad ? ((in[4] > square) | (in[4] != in[4]) ? in[4] : square) : square;  // NaN stays
    root = square_root(maximum(broadcast(kLeast), largest));
  }
  static constexpr T kLeast = sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);  // that is normal
};

template <class T>
struct AdamRule {
  static constexpr int kOperands = 10, kResults = 4;
  bool decoupled, amsgrad, decays;

  template <class V>
  FM_INLINE void operator()(const V* in, V* out) const {
    const AdamStep<V, T> step(in, decoupled, amsgrad, decays);
    const V start = decays && decoupled ? in[0] - in[9] * in[0] : in[0];
    out[0] = start - in[5] * (step.mean / (step.root + in[8]));
    out[1] = step.mean;
    out[2] = step.square;
    out[3] = step.largest;
  }
};

template <class T>
struct AdamGradientRule {
  static constexpr int kOperands = 14, kResults = 10;
  bool decoupled, amsgrad, decays;

  template <class V>
  FM_INLINE void operator()(const V* in, V* out) const {
    const AdamStep<V, T> step(in, decoupled, amsgrad, decays);
    const V p = in[0], rate = in[5], decay = in[9], d_moved = in[10];
    const V inverse = broadcast(T(1)) / (step.root + in[8]);
    const V along = step.mean * inverse, d_along = -rate * d_moved * inverse;  // of the mean
    const V d_mean = in[11] + d_along;
    const V d_below = -d_along * along;  // of root + eps
    // at 0 the root's slope counts as 0: what it would multiply is
    const V slope = step.largest < AdamStep<V, T>::kLeast ? V{} : broadcast(T(0.5)) / step.root;
    const V d_largest = d_below * slope + (amsgrad ? in[13] : V{});
    V d_maximum = V{}, d_square = d_largest;
    if (amsgrad) {  // a tie counts half for each, as in torch
      const V half = broadcast(T(0.5)) * d_largest;
      d_maximum = in[4] > step.square ? d_largest : in[4] == step.square ? half : V{};
      d_square = in[4] > step.square ? V{} : in[4] == step.square ? half : d_largest;
    }
    d_square += in[12];
    const V share1 = in[6], share2 = in[7], g = step.g;
    const V d_g = share1 * d_mean + broadcast(T(2)) * share2 * g * d_square;
    out[0] = !decays ? d_moved : decoupled ? d_moved - decay * d_moved : d_moved + decay * d_g;
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

}  // namespace fastmeta::FASTMETA_ISA

// A whole MLP over the rows of one task, forward and backward, block of rows by block of rows.
//
// Activations are kept feature-major, [features, rows]: then W [out, in] is the left factor of the forward product as
// it stands, and of the backward product read down its columns. No weight is ever packed or transposed, which is what
// pays when every task has its own.
#pragma once

#include <fastmeta/gemm.h>

#include "activation_kernel.h"
#include "kernels.h"
#include "query_block.h"
#include "carver.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct MlpBlock {
  const cpu::MlpItem<T>& item;
  int64_t ld;  // rows of a block, a multiple of the vector width
  int64_t widest = 1;  // of the layers' outputs
  T* input;            // part of x, transposed
  T* value[cpu::kMaxLayers + 1];  // [width, ld] inputs of layer l; forward: two buffers in turn
  T* before[cpu::kMaxLayers + 1];  // pre-activations, where the derivative needs them
  T* gradient[2];
  T* row_major;

  MlpBlock(const cpu::MlpItem<T>& item, bool backward) : item(item) {
    constexpr int W = kWidth<T>;
    for (int64_t l = 1; l <= item.layers; ++l) widest = larger(widest, item.widths[l]);
    const int64_t room = (64 << 10) / int64_t(sizeof(T)) / widest / W * W;
    const int64_t most = larger(4 * W, smaller(96, room)), rows = larger(1, item.rows);
    ld = padded<T>(divide_up(rows, divide_up(rows, most)));
    Carver carver{nullptr};
    carve(carver, backward);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    carve(carver, backward);
  }

  void carve(Carver& c, bool backward) {
    input = c.take<T>(smaller(item.widths[0], kDepthBlock) * ld);
    if (!backward) {
      T* buffers[2] = {c.take<T>(widest * ld), c.take<T>(widest * ld)};
      for (int64_t l = 1; l <= item.layers; ++l) value[l] = before[l] = buffers[l % 2];
      return;
    }
    for (int64_t l = 1; l < item.layers; ++l) {
      value[l] = c.take<T>(item.widths[l] * ld);
      before[l] = derivative_needs_input(item.activation) ? c.take<T>(item.widths[l] * ld) : value[l];
    }
    gradient[0] = c.take<T>(widest * ld);
    gradient[1] = c.take<T>(widest * ld);
    row_major = c.take<T>(padded<T>(widest) * ld);
  }

  // value[l + 1] = activation(W_l value[l] + b_l)
  void layer(int64_t l, int64_t first_row, int64_t rows) {
    const int64_t in = item.widths[l], out = item.widths[l + 1], lanes = padded<T>(rows);
    const bool hidden = l + 1 < item.layers, relu = hidden && item.activation == cpu::kRelu;
    Finish<T> finish;
    finish.row_start = item.biases ? item.biases[l] : nullptr;
    if (l > 0) {
      if (relu) finish.then = Finish<T>::relu;
      multiply<T>(out, lanes, in, item.weights[l], in, 1, Right<T>{value[l], ld, 0, true}, before[l + 1], ld, finish);
    } else {
      const T* x = item.x + first_row * in;
      for (int64_t k = 0; k == 0 || k < in; k += kDepthBlock) {
        const int64_t depth = smaller(kDepthBlock, in - k);
        transpose(rows, depth, x + k, in, input, ld, lanes);
        if (relu && k + kDepthBlock >= in) finish.then = Finish<T>::relu;
        multiply<T>(out, lanes, depth, item.weights[0] + k, in, 1, Right<T>{input, ld, 0, true}, before[1], ld, finish);
        finish.add = true;
        finish.row_start = nullptr;
      }
    }
    if (hidden && !relu) activate(item.activation, before[l + 1], value[l + 1], out * ld);
  }
};

template <class T>
void mlp(const cpu::MlpItem<T>& item) {
  MlpBlock<T> block(item, false);
  const int64_t outputs = item.widths[item.layers];
  for (int64_t first = 0; first < item.rows; first += block.ld) {
    const int64_t rows = smaller(block.ld, item.rows - first);
    for (int64_t l = 0; l < item.layers; ++l) block.layer(l, first, rows);
    transpose(outputs, rows, block.value[item.layers], block.ld, item.out + first * outputs, outputs, outputs);
  }
}

template <class T>
void mlp_gradient(const cpu::MlpItem<T>& item) {
  MlpBlock<T> block(item, true);
  const int64_t ld = block.ld, last = item.layers - 1, outputs = item.widths[item.layers];
  for (int64_t first = 0; first == 0 || first < item.rows; first += ld) {
    const int64_t rows = smaller(ld, item.rows - first), lanes = padded<T>(rows);
    for (int64_t l = 0; l < last; ++l) block.layer(l, first, rows);
    T *g = block.gradient[0], *next = block.gradient[1];
    transpose(rows, outputs, item.grad + first * outputs, outputs, g, ld, lanes);
    for (int64_t l = last; l >= 0; --l) {
      const int64_t in = item.widths[l], out = item.widths[l + 1];
      Finish<T> finish;
      if (item.d_weights) {
        Right<T> right{item.x + first * in, in};
        if (l > 0) {
          transpose(in, rows, block.value[l], ld, block.row_major, padded<T>(in), padded<T>(in));
          right = {block.row_major, padded<T>(in), 0, true};
        }
        finish.add = first > 0 || item.add_weights[l];
        multiply<T>(out, in, rows, g, ld, 1, right, item.d_weights[l], in, finish);
      }
      if (item.d_biases) {
        const bool add = first > 0 || item.add_biases[l];
        T* d = item.d_biases[l];
        for (int64_t o = 0; o < out; ++o) d[o] = (add ? d[o] : 0) + sum_of_row(g + o * ld, rows);
      }
      if (l > 0) {
        multiply<T>(in, lanes, out, item.weights[l], 1, in, Right<T>{g, ld, 0, true}, next, ld, Finish<T>{});
        times_derivative(item.activation, block.before[l], block.value[l], next, in * ld);
        T* swap = g;
        g = next;
        next = swap;
      } else if (item.dx) {
        finish.add = item.add_dx;
        multiply<T>(rows, in, out, g, 1, ld, Right<T>{item.weights[0], in}, item.dx + first * in, in, finish);
      }
    }
  }
}

}  // namespace fastmeta::FASTMETA_ISA

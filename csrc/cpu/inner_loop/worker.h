// One worker's scratch memory for the tasks it runs, and the steps of a task forward in time.
//
// A *state* is the weights of one moment, with the coefficients of the first layer behind them in the Gram form; a
// *moment* is laid out likewise. Going backward, states and rows of all steps are kept where they are small; else those
// of one segment of about sqrt(steps) steps, run again from its first state.
#pragma once

#include "net.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int64_t kKeepBytes = 8 << 20;  // states and rows of all steps, up to here
constexpr int64_t kQueryRows = 48;       // at once

// Offsets of what is kept of the support rows at one step. By layer: `value` its input, the others at its output.
struct StepRows {
  int64_t value[cpu::kMostInnerLayers], slope[cpu::kMostInnerLayers], second[cpu::kMostInnerLayers];
  int64_t delta[cpu::kMostInnerLayers];
  int64_t curvature, size;
};

template <class T>
struct InnerWorker {
  const cpu::InnerLoop<T>& p;
  const InnerNet<T> net;
  const int64_t layers, support, steps;
  const bool gradient, relu, curved;
  const bool sweeps;     // steps are gone through backward
  const bool curvature;  // with second derivatives
  const bool plain;      // W' = W - rate * gradient
  bool shared = true;    // all weights
  int64_t task = 0, group = 0;

  int64_t width[cpu::kMostInnerLayers + 1];  // padded
  int64_t widest = 0, coefficients = 0;      // numbers of the latter
  StepRows step, chunk;
  int64_t state_size, moment_size, segment, segments, query_rows;
  bool support_padded, query_padded;

  T *start_state, *states, *checkpoints, *moments, *moment_checkpoints, *rows, *zeros, *spread, *support_x, *given;
  T *query_x, *query_values, *query_delta[2], *path_room;
  T *element_rates;
  T *v, *r, *u, *sum, *d_element_rates, *element_sum, *moment;  // adjoints of a state and of a moment, and what adds up
  T *dot_value[cpu::kMostInnerLayers], *dot_z[cpu::kMostInnerLayers], *dot_delta[2], *d_support_x, *d_query_x;

  InnerWorker(const cpu::InnerLoop<T>& p, bool gradient)
      : p(p),
        net(p),
        layers(p.layers),
        support(p.support.count),
        steps(p.steps),
        gradient(gradient),
        relu(p.activation == cpu::kRelu),
        curved(is_curved(p.activation)),
        sweeps(gradient && (!p.first_order || p.d_rates.base || has_element_gradient(p) || p.weight_decay != 0)),
        curvature(sweeps && !p.first_order),
        plain(p.momentum == 0 && p.weight_decay == 0 && !p.elementwise) {
    for (int64_t l = 0; l <= layers; ++l) {
      width[l] = padded<T>(p.widths[l]);
      widest = larger(widest, width[l]);
    }
    for (int64_t l = net.first; l < layers; ++l)
      shared = shared && p.weights[l].step == 0 && (!p.biased || p.biases[l].step == 0);
    coefficients = p.gram ? support * width[1] : 0;
    state_size = net.whole + coefficients;
    moment_size = net.size + coefficients;
    plan(step, support, curvature, true);
    const bool together = p.loss == cpu::kMaximumEntropy;  // whose rows are no good one by one
    query_rows = together ? p.query.count : divide_up(p.query.count, larger(1, divide_up(p.query.count, kQueryRows)));
    plan(chunk, query_rows, false, false);
    const bool first_by_input = p.gram || net.layer[0].by_input;
    support_padded = !first_by_input && width[0] != p.widths[0];
    query_padded = support_padded || (p.gram && width[1] != p.widths[1]);

    segment = gradient ? steps : 1;
    const int64_t bytes = (state_size + step.size + (p.momentum != 0 ? moment_size : 0)) * int64_t(sizeof(T));
    if (!sweeps) segment = 1;
    else if (steps * bytes > kKeepBytes) {
      segment = larger(1, kKeepBytes / bytes);
      while (segment * segment < steps) ++segment;
    }
    segments = sweeps ? divide_up(steps, larger(1, segment)) : 1;

    Carver carver{nullptr};
    carve(carver);
    carver = {static_cast<char*>(cpu::thread_scratch(carver.used))};
    memset(carver.base, 0, bytes_needed);
    carve(carver);
    if (shared) pack_start();
    if (p.elementwise && rates_shared()) pack_element_rates();
  }
  size_t bytes_needed = 0;

  static bool has_element_gradient(const cpu::InnerLoop<T>& p) {
    return p.elementwise && p.d_weight_rates[p.gram].base != nullptr;
  }

  void plan(StepRows& s, int64_t n, bool second, bool deltas) {
    int64_t size = 0;
    const auto take = [&](int64_t numbers) {
      const int64_t at = size;
      size += padded<T>(numbers);
      return at;
    };
    for (int64_t l = 0; l < layers; ++l) {
      const bool hidden = l + 1 < layers;
      if (hidden) {
        s.value[l + 1] = take(n * width[l + 1]);
        s.slope[l] = relu ? s.value[l + 1] : take(n * width[l + 1]);
        s.second[l] = second && curved ? take(n * width[l + 1]) : -1;
      }
      s.delta[l] = deltas ? take(n * width[l + 1]) : 0;
    }
    s.curvature = second ? take(larger(n * width[layers], p.support.paths.count())) : -1;
    s.size = size;
  }

  void carve(Carver& c) {
    start_state = c.take<T>(state_size);
    states = c.take<T>(state_size * (segment + 1));
    checkpoints = c.take<T>(state_size * (segments - 1));
    const bool moving = p.momentum != 0;
    moments = c.take<T>(plain ? 0 : moment_size * (sweeps && moving ? segment + 1 : 1));
    moment_checkpoints = c.take<T>(moving ? moment_size * (segments - 1) : 0);
    rows = c.take<T>(step.size * larger(1, segment));
    zeros = c.take<T>(widest);
    spread = c.take<T>(larger(support, query_rows) * widest);
    support_x = c.take<T>(support_padded ? support * width[0] : 0);
    given = c.take<T>(coefficients);
    query_x = c.take<T>(query_padded ? query_rows * width[p.gram] : 0);
    query_values = c.take<T>(chunk.size);
    for (T*& buffer : query_delta) buffer = c.take<T>(query_rows * widest);
    path_room = c.take<T>(2 * padded<T>(larger(p.support.paths.count(), p.query.paths.count())));
    element_rates = c.take<T>(p.elementwise ? net.size : 0);
    if (gradient) {
      v = c.take<T>(state_size);
      r = c.take<T>(state_size);
      u = c.take<T>(moment_size);
      sum = c.take<T>(net.size);
      d_element_rates = c.take<T>(p.elementwise ? net.size : 0);
      element_sum = c.take<T>(p.elementwise ? net.size : 0);
      moment = c.take<T>(moment_size);
      for (int64_t l = 0; l < layers; ++l) {
        dot_value[l] = c.take<T>(l > 0 ? support * width[l] : 0);
        dot_z[l] = c.take<T>(support * width[l + 1]);
      }
      for (T*& buffer : dot_delta) buffer = c.take<T>(support * widest);
      d_support_x = c.take<T>(p.d_support_x.base ? support * width[p.gram] : 0);
      d_query_x = c.take<T>(p.d_query_x.base ? query_rows * width[p.gram] : 0);
    }
    bytes_needed = c.used;
  }

  T* state(int64_t segment_index, int64_t i) const {
    return i == 0 && segment_index == 0 ? start_state : states + i * state_size;
  }
  T* step_rows(int64_t i) const { return rows + (sweeps ? i : 0) * step.size; }
  T* moment_at(int64_t i) const { return moments + (sweeps && p.momentum != 0 ? i : 0) * moment_size; }

  void pack_start() {
    for (int64_t l = net.first; l < layers; ++l)
      net.pack(net.layer[l], of_task<T>(p.weights[l], task), p.biased ? of_task<T>(p.biases[l], task) : nullptr,
               start_state);
    net.transpose_copies(start_state, steps == 0);
  }
  bool rates_shared() const {
    bool same = true;
    for (int64_t l = net.first; l < layers; ++l)
      same = same && p.weight_rates[l].step == 0 && (!p.biased || p.bias_rates[l].step == 0);
    return same;
  }
  void pack_element_rates() {
    for (int64_t l = net.first; l < layers; ++l)
      net.pack(net.layer[l], of_task<T>(p.weight_rates[l], task),
               p.biased ? of_task<T>(p.bias_rates[l], task) : nullptr, element_rates);
  }

  // rows [n, columns] of the caller's, or their padded copy in `room`
  const T* padded_rows(const T* from, int64_t n, int64_t columns, T* room) const {
    if (padded<T>(columns) == columns) return from;
    for (int64_t i = 0; i < n; ++i)
      InnerNet<T>::copy_padded(from + i * columns, columns, room + i * padded<T>(columns), padded<T>(columns));
    return room;
  }
  static void unpad(const T* from, int64_t n, int64_t columns, T* to) {
    for (int64_t i = 0; i < n && columns > 0; ++i)
      memcpy(to + i * columns, from + i * padded<T>(columns), size_t(columns) * sizeof(T));
  }

  // what the task's support rows are, once per task
  const T* x = nullptr;  // the first layer's input, dense form
  int64_t ldx = 0;
  void take_support() {
    const T* from = of_task<T>(p.support.x, task);
    if (p.gram) {
      for (int64_t i = 0; i < support; ++i)
        InnerNet<T>::copy_padded(from + i * p.widths[1], p.widths[1], given + i * width[1], width[1]);
      return;
    }
    x = support_padded ? padded_rows(from, support, p.widths[0], support_x) : from;
    ldx = support_padded ? width[0] : p.widths[0];
  }
  const T* input(const T* at, int64_t l) const { return l == 0 ? x : at + step.value[l]; }
  int64_t ld_input(int64_t l) const { return l == 0 ? ldx : width[l]; }

  void activate(const StepRows& s, T* at, int64_t l, int64_t n) const {
    const int64_t numbers = n * width[l + 1];
    T* value = at + s.value[l + 1];
    if (relu) return;  // done with the product's store
    if (s.second[l] >= 0)
      activate_curved<T, true>(p.activation, value, value, at + s.slope[l], at + s.second[l], numbers);
    else
      activate_curved<T, false>(p.activation, value, value, at + s.slope[l], nullptr, numbers);
    const int64_t real = p.widths[l + 1];
    if (p.activation == cpu::kSigmoid && real != width[l + 1])  // the one that does not keep the padding zero
      for (int64_t i = 0; i < n; ++i) fill_zero(value + i * width[l + 1] + real, width[l + 1] - real);
  }

  // z = given - gram C: the first layer's pre-activations in the Gram form, rows of `gram` [n, support]
  void from_gram(int64_t n, const T* gram, const T* z, const T* state, T* out) const {
    Product<T> product;
    product.c = out;
    product.ldc = product.start_row = width[1];
    product.start = z;
    product.factor = -1;
    product.relu = relu && layers > 1;
    product.term = {gram, support, 1, state + net.whole, width[1], support};
    multiply_along(n, width[1], product);
  }

  // the net on n rows; pre-activations of the last layer to `logits`
  void forward(const StepRows& s, T* at, const T* state, int64_t n, const T* first, int64_t ld_first, const T* gram,
               bool copied, T* logits) const {
    for (int64_t l = 0; l < layers; ++l) {
      T* z = l + 1 < layers ? at + s.value[l + 1] : logits;
      if (l < net.first) {
        from_gram(n, gram, first, state, z);
      } else {
        const InnerLayer& a = net.layer[l];
        const T* input = l == 0 ? first : at + s.value[l];
        through_layer<T>(a, true, copied ? a.query_copied : a.copied, n, {input, l == 0 ? ld_first : width[l], state},
                         {}, T(1), z, state + a.bias, 0, {relu && l + 1 < layers, nullptr});
      }
      if (l + 1 < layers) activate(s, at, l, n);
    }
  }

  // forward and gradients at all pre-activations of the support rows
  void support_gradient(const T* state, T* at) const {
    T* last = at + step.delta[layers - 1];
    forward(step, at, state, support, p.gram ? given : x, ldx, of_task<T>(p.support.gram, task), false, spread);
    LossRows<T> loss{support, p.widths[layers], width[layers], spread};
    loss.labels = of_task<T>(p.support.labels, task);
    loss.target = of_task<T>(p.support.target, task);
    loss.weight = of_task<T>(p.support.weight, task);
    loss.paths = &p.support.paths;
    loss.room = path_room;
    loss.delta = last;
    loss.curvature = step.curvature >= 0 ? at + step.curvature : nullptr;
    row_losses<T>(p.loss, p.delta, loss);
    for (int64_t l = layers - 1; l > 0; --l) {
      const InnerLayer& a = net.layer[l];
      T* next = at + step.delta[l - 1];
      through_layer<T>(a, false, a.copied, support, {at + step.delta[l], width[l + 1], state}, {}, T(1), next, zeros, 0,
                       {false, relu ? at + step.slope[l - 1] : nullptr});
      pass_activation(step, at, l - 1, support, next);
    }
  }
  // delta = b * phi' in place
  void pass_activation(const StepRows& s, T* at, int64_t l, int64_t n, T* b) const {
    if (!curved) return;  // relu: done with the product's store
    through_activation<T>(b, at + s.slope[l], s.second[l] >= 0 ? at + s.second[l] : nullptr, b, n * width[l + 1]);
  }

  // to = from + factor * gradient, all weights
  void add_gradients(const T* at, const T* from, const T* rates, T factor, T* to) const {
    for (int64_t l = net.first; l < layers; ++l) {
      const InnerLayer& a = net.layer[l];
      const T f = rates ? factor * rates[l] : factor;
      add_gradient<T>(a, support, at + step.delta[l], input(at, l), ld_input(l), nullptr, nullptr, from + a.weight,
                      a.np, f, to + a.weight);
      if (p.biased)
        add_column_sums(support, width[l + 1], at + step.delta[l], from + a.bias, f, to + a.bias);
    }
  }

  // one pass over each layer's numbers [begin, end) of a block
  template <class F>
  void by_layer(const F& f) const {
    for (int64_t l = net.first; l < layers; ++l) {
      const InnerLayer& a = net.layer[l];
      f(l, a.weight, a.weight + a.m * a.np);
      if (p.biased) f(l, a.bias, a.bias + width[l + 1]);
    }
  }

  // moment' = momentum * moment + gradient + weight_decay * W; moments of the first layer's coefficients behind it
  void next_moment(const T* at, const T* state, const T* old, T* to) const {
    const T keep = p.momentum, decay = p.weight_decay;
    map_vectors<T>(net.size, [&](int64_t i) __attribute__((always_inline)) {
      Vec<T> m = decay * load(state + i);
      if (old) m += keep * load(old + i);
      store(to + i, m);
    });
    add_gradients(at, to, nullptr, T(1), to);
    const T* first = at + step.delta[0];
    map_vectors<T>(coefficients, [&](int64_t i) __attribute__((always_inline)) {
      Vec<T> m = load(first + i);
      if (old) m += keep * load(old + net.size + i);
      store(to + net.size + i, m);
    });
  }

  // state' from state and the rows at it; `old` and `to_moment` may be one
  void update(int64_t k, const T* at, const T* from, const T* old, T* to_moment, T* to) const {
    const T* rates = of_task<T>(p.rates, task) + k * layers;
    if (plain) {
      add_gradients(at, from, rates, T(-1), to);
    } else {
      next_moment(at, from, k > 0 && p.momentum != 0 ? old : nullptr, to_moment);
      by_layer([&](int64_t l, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kWidth<T>) {
          Vec<T> m = load(to_moment + i) * rates[l];
          if (p.elementwise) m *= load(element_rates + i);
          store(to + i, load(from + i) - m);
        }
      });
    }
    const T* first = plain ? at + step.delta[0] : to_moment + net.size;
    map_vectors<T>(coefficients, [&](int64_t i) __attribute__((always_inline)) {
      store(to + net.whole + i, load(from + net.whole + i) + rates[0] * load(first + i));
    });
  }

  // Steps of one segment; returns the state after them.
  T* run_segment(int64_t s, bool last) {
    const int64_t begin = s * segment, end = smaller(steps, begin + segment);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k - begin;
      T *from = state(s, i), *to = states + (i + 1) * state_size, *at = step_rows(i);
      support_gradient(from, at);
      update(k, at, from, moment_at(i), moment_at(sweeps ? i + 1 : 0), to);
      net.transpose_copies(to, last && k + 1 == steps);
    }
    return state(s, end - begin);
  }

  // All steps of a task; returns the last state.
  T* adapt() {
    if (!shared) pack_start();
    if (p.elementwise && !rates_shared()) pack_element_rates();
    take_support();
    if (!sweeps) {  // one buffer, in place after the first step
      T* now = start_state;
      for (int64_t k = 0; k < steps; ++k) {
        support_gradient(now, rows);
        update(k, rows, now, moments, moments, states);
        now = states;
        net.transpose_copies(now, k + 1 == steps);
      }
      return now;
    }
    T* now = start_state;
    for (int64_t s = 0; s < segments && steps > 0; ++s) {
      if (s > 0) {
        memcpy(checkpoints + (s - 1) * state_size, now, size_t(state_size) * sizeof(T));
        move_moment(s, now);
      }
      now = run_segment(s, true);
    }
    return now;
  }
  // the state and moment that segment s starts from, to the front of the buffers, and to the checkpoints
  void move_moment(int64_t s, const T* now) {
    memcpy(states, now, size_t(state_size) * sizeof(T));
    if (p.momentum == 0) return;
    const size_t bytes = size_t(moment_size) * sizeof(T);
    memcpy(moment_checkpoints + (s - 1) * moment_size, moments + segment * moment_size, bytes);
    memcpy(moments, moments + segment * moment_size, bytes);
  }
  // an earlier segment once more
  void run_again(int64_t s) {
    if (s > 0) {
      memcpy(states, checkpoints + (s - 1) * state_size, size_t(state_size) * sizeof(T));
      if (p.momentum != 0)
        memcpy(moments, moment_checkpoints + (s - 1) * moment_size, size_t(moment_size) * sizeof(T));
    }
    run_segment(s, false);
  }
};

}  // namespace fastmeta::FASTMETA_ISA

// adapt_mlp and meta_loss_mlp for nets so small that their many products cost by their number: as many tasks at once as
// a vector has lanes, a *pack*. What is computed, and what is called how, is as in inner_loop/kernel.h; here every number
// is a vector, and a *state* is weights [out, in] and biases, layer by layer. Before the first step it may be the
// caller's own, where tasks share it: a null state.
#pragma once

#include "../lanes.h"
#include "lanes_rows.h"
#include "worker.h"

namespace fastmeta::FASTMETA_ISA {

constexpr int64_t kLaneStateBytes = 320 << 10, kLaneInputBytes = 6 << 10;  // of a pack, and of a row: up to here
constexpr int64_t kLaneFewRows = 20;
constexpr int64_t kLaneQueryRows = 20;  // at once

template <class T>
struct LaneLoop {
  static constexpr int64_t W = kWidth<T>;

  const cpu::InnerLoop<T>& p;
  const int64_t layers, support, steps;
  const bool gradient, relu, curved, sweeps, curvature;
  bool shared = true;                         // the first state
  int64_t task = 0, count = 0, group = 0;     // of the pack: its first task, and how many
  bool is_first = true;                       // of the range
  int64_t weight_at[cpu::kMostInnerLayers], bias_at[cpu::kMostInnerLayers], size = 0;  // of a state
  int64_t widest = 0, query_rows;
  StepRows step, chunk;
  size_t bytes;

  T *start, *states, *rows, *x, *target, *row_weight, *rates, *logits, *numbers;
  T *query_x, *query_target, *query_weight, *query_values, *query_delta[2], *d_query_x;
  T *v, *r, *sum, *moment, *direction, *d_rates, *rates_sum, *d_x;
  T *element_rates, *d_element_rates, *element_sum;
  T *dot_value[cpu::kMostInnerLayers], *dot_z[cpu::kMostInnerLayers], *dot_delta[2];

  LaneLoop(const cpu::InnerLoop<T>& p, bool gradient)
      : p(p),
        layers(p.layers),
        support(p.support.count),
        steps(p.steps),
        gradient(gradient),
        relu(p.activation == cpu::kRelu),
        curved(is_curved(p.activation)),
        sweeps(gradient && (!p.first_order || p.d_rates.base || p.d_weight_rates[0].base)),
        curvature(sweeps && !p.first_order) {
    for (int64_t l = 0; l < layers; ++l) {
      shared = shared && p.weights[l].step == 0 && (!p.biased || p.biases[l].step == 0);
      weight_at[l] = size;
      size += p.widths[l] * p.widths[l + 1];
      bias_at[l] = size;
      size += p.biased ? p.widths[l + 1] : 0;
      widest = larger(widest, larger(p.widths[l], p.widths[l + 1]));
    }
    query_rows = divide_up(p.query.count, larger(1, divide_up(p.query.count, kLaneQueryRows)));
    plan(step, support, curvature, true);
    plan(chunk, query_rows, false, false);
    Carver carver{nullptr};
    carve(carver);
    bytes = carver.used;
  }

  // Whether it takes this problem, and gains by it. Rows 4096 bytes apart all fall into one set of the first-level cache.
  bool serves() const {
    constexpr int64_t number = W * int64_t(sizeof(T));
    const bool plain = p.momentum == 0 && p.weight_decay == 0;
    const bool rows_alone = p.loss != cpu::kMaximumEntropy;
    bool empty = support == 0 || steps == 0 || (p.query_pass && p.query.count == 0), collides = false;
    for (int64_t l = 0; l <= layers; ++l) {
      empty = empty || p.widths[l] == 0;
      collides = collides || (l < layers && p.widths[l] * number % 4096 == 0 && p.widths[l + 1] > kLaneFewRows);
    }
    return plain && rows_alone && !p.gram && !empty && !collides && 4 * p.tasks_each >= 3 * W &&
           p.widths[0] * number <= kLaneInputBytes && size * number <= kLaneStateBytes && int64_t(bytes) <= kKeepBytes;
  }
  void begin() {
    Carver carver{static_cast<char*>(cpu::thread_scratch(bytes))};
    carve(carver);
  }

  void plan(StepRows& s, int64_t n, bool second, bool deltas) {
    s.size = 0;
    const auto take = [&](int64_t width) {
      const int64_t at = s.size;
      s.size += n * width;
      return at * W;
    };
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t width = p.widths[l + 1];
      if (l + 1 < layers) {
        s.value[l + 1] = take(width);
        s.slope[l] = relu ? s.value[l + 1] : take(width);
        s.second[l] = second && curved ? take(width) : -1;
      }
      s.delta[l] = deltas ? take(width) : 0;
    }
    s.curvature = second ? take(p.widths[layers]) : -1;
  }

  void carve(Carver& c) {
    const auto take = [&](int64_t n) { return c.take<T>(n * W); };
    const int64_t inputs = p.widths[0], outputs = p.widths[layers], targets = p.loss == cpu::kCrossEntropy ? 1 : outputs;
    start = take(shared ? 0 : size);
    states = take(size * (sweeps ? steps : 1));
    rows = take(step.size * (sweeps ? steps : 1));
    x = take(support * inputs);
    target = take(support * targets);
    row_weight = take(support);
    rates = take(steps * layers);
    logits = take(larger(support, query_rows) * outputs);
    numbers = take(larger(1, query_rows * outputs));
    const auto take_gradient = [&](int64_t n) { return take(gradient ? n : 0); };
    v = take_gradient(size);
    sum = take_gradient(size);
    d_rates = take_gradient(steps * layers);
    rates_sum = take_gradient(steps * layers);
    d_x = take(p.d_support_x.base ? support * inputs : 0);
    const int64_t elements = p.elementwise ? size : 0;
    element_rates = take(elements);
    d_element_rates = take_gradient(elements);
    element_sum = take_gradient(elements);
    r = take_gradient(elements);
    moment = take(elements || p.d_rates.base ? size : 0);
    // query rows are done with before the way back begins: both in the same place
    const size_t place = c.used;
    query_x = take(query_rows * inputs);
    query_target = take(query_rows * targets);
    query_weight = take(query_rows);
    query_values = take(chunk.size);
    for (T*& buffer : query_delta) buffer = take_gradient(query_rows * widest);
    d_query_x = take(p.d_query_x.base ? query_rows * inputs : 0);
    const size_t end = c.used;
    c.used = place;
    direction = take_gradient(widest);
    for (int64_t l = 0; l < layers; ++l) {
      dot_value[l] = take_gradient(l > 0 ? support * p.widths[l] : 0);
      dot_z[l] = take_gradient(support * p.widths[l + 1]);
    }
    for (T*& buffer : dot_delta) buffer = take_gradient(support * widest);
    c.used = end > c.used ? end : c.used;
  }

  // ---- between the callers' tensors and lanes -------------------------------------------------------------------------

  // n numbers of each task, from its number `at` on; lanes without a task become 0
  void take(const cpu::Operand<T>& from, int64_t at, int64_t n, T* to) const {
    to_lanes<T>(count, n, of_task<T>(from, task) + at, from.step, to);
  }
  void take_labels(const cpu::Operand<int64_t>& from, int64_t at, int64_t n, T* to) const {
    fill_zero(to, n * W);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t* labels = of_task<int64_t>(from, task + lane) + at;
      for (int64_t i = 0; i < n; ++i) to[i * W + lane] = T(labels[i]);
    }
  }
  void take_targets(const cpu::Rows<T>& from, int64_t at, int64_t n, T* to) const {
    if (p.loss == cpu::kCrossEntropy) return take_labels(from.labels, at, n, to);
    const int64_t outputs = p.widths[layers];
    take(from.target, at * outputs, n * outputs, to);
  }
  void give(const T* from, int64_t n, const cpu::Target<T>& to, int64_t at = 0) const {
    transpose<T>(n, count, from, W, of_task(to, task, group) + at, to.step, n);
  }

  LaneNumbers<T> weight(int64_t l, const T* state) const {
    return state ? LaneNumbers<T>{state + weight_at[l] * W} : LaneNumbers<T>{p.weights[l].base, true};
  }
  LaneNumbers<T> bias(int64_t l, const T* state) const {
    if (!p.biased) return {};
    return state ? LaneNumbers<T>{state + bias_at[l] * W} : LaneNumbers<T>{p.biases[l].base, true};
  }

  // ---- products with a layer --------------------------------------------------------------------------------------

  // c = start + factor * (input W^T), or with W in place of W^T
  LaneProduct<T> through(int64_t l, bool forward, LaneNumbers<T> w, const T* input, T* c) const {
    const int64_t in = p.widths[l], out = p.widths[l + 1];
    if (forward) return {input, in, 1, w, 1, in, in, c, out, 1};
    return {input, out, 1, w, in, 1, out, c, in, 1};
  }
  void multiply(int64_t n, const LaneProduct<T>& product) const { multiply_lanes(n, product.c_row, product); }

  // to = from + factor * gradient of layer l: of n rows, and of `other` ones too; `from` none: 0. As a product of the
  // transpose, so that memory is gone through in order, where that fills tiles.
  void gradient_of(int64_t l, int64_t n, const T* delta, const T* input, LaneNumbers<T> from, const T* factor, T* to,
                   const T* other_delta = nullptr, const T* other_input = nullptr) const {
    const int64_t in = p.widths[l], out = p.widths[l + 1];
    LaneProduct<T> product{input, 1, in, {delta}, out, 1, n, to + weight_at[l] * W, 1, in, from, 1, in, factor};
    product.other_a = other_delta ? other_input : nullptr;
    product.other_b = other_delta;
    if (in >= kLaneRows || in >= out) return multiply_lanes(in, out, product);
    swap(product.a, product.b.base);
    swap(product.other_a, product.other_b);
    swap(product.a_step, product.b_step);
    swap(product.c_row, product.c_column);
    swap(product.start_row, product.start_column);
    multiply_lanes(out, in, product);
  }
  template <class E>
  static void swap(E& a, E& b) {
    const E c = a;
    a = b;
    b = c;
  }
  void bias_gradient_of(int64_t l, int64_t n, const T* delta, LaneNumbers<T> b, const T* factor, T* to) const {
    if (p.biased) sum_columns_of_lanes(n, p.widths[l + 1], delta, b, factor, to + bias_at[l] * W);
  }

  // ---- forward in time ---------------------------------------------------------------------------------------------

  void forward(const StepRows& s, T* at, const T* state, int64_t n, const T* first) const {
    for (int64_t l = 0; l < layers; ++l) {
      const bool hidden = l + 1 < layers;
      LaneProduct<T> product =
          through(l, true, weight(l, state), l == 0 ? first : at + s.value[l], hidden ? at + s.value[l + 1] : logits);
      product.start = bias(l, state);
      product.relu = relu && hidden;
      multiply(n, product);
      if (!hidden || relu) continue;
      T* second = s.second[l] >= 0 ? at + s.second[l] : nullptr;
      const auto activate = second ? activate_curved<T, true> : activate_curved<T, false>;
      activate(p.activation, product.c, product.c, at + s.slope[l], second, n * product.c_row * W);
    }
  }
  // delta of the layer below l from that of l, `delta`
  void delta_below(const StepRows& s, T* at, int64_t l, const T* state, int64_t n, const T* delta, T* below) const {
    LaneProduct<T> product = through(l, false, weight(l, state), delta, below);
    if (relu) product.mask = at + s.slope[l - 1];
    multiply(n, product);
    if (!curved) return;
    T* second = s.second[l - 1] >= 0 ? at + s.second[l - 1] : nullptr;
    through_activation<T>(below, at + s.slope[l - 1], second, below, n * product.c_row * W);
  }

  void support_gradient(const T* state, T* at) const {
    forward(step, at, state, support, x);
    LaneLoss<T> loss{support, p.widths[layers], logits, target, row_weight};
    loss.delta = at + step.delta[layers - 1];
    loss.curvature = step.curvature >= 0 ? at + step.curvature : nullptr;
    lane_losses<T>(p.loss, p.delta, loss);
    for (int64_t l = layers - 1; l > 0; --l)
      delta_below(step, at, l, state, support, at + step.delta[l], at + step.delta[l - 1]);
  }
  const T* input(const T* at, int64_t l) const { return l == 0 ? x : at + step.value[l]; }
  T* step_rows(int64_t k) const { return rows + (sweeps ? k : 0) * step.size * W; }
  T* state_after(int64_t k) const { return states + (sweeps ? k : 0) * size * W; }
  const T* state_before(int64_t k) const { return k > 0 ? state_after(k - 1) : shared ? nullptr : start; }

  // All steps of the pack's tasks; returns the last state. Rates are kept as what steps are multiplied by: negative.
  const T* adapt() {
    for (int64_t l = 0; l < layers && !shared; ++l) take_layer(l, p.weights[l], p.biases[l], start);
    take(p.support.x, 0, support * p.widths[0], x);
    take_targets(p.support, 0, support, target);
    take(p.support.weight, 0, support, row_weight);
    take(p.rates, 0, steps * layers, rates);
    map_vectors<T>(steps * layers * W, [&](int64_t i) __attribute__((always_inline)) {
      store(rates + i, -load(rates + i));
    });
    for (int64_t l = 0; l < layers && p.elementwise; ++l)
      take_layer(l, p.weight_rates[l], p.bias_rates[l], element_rates);
    for (int64_t k = 0; k < steps; ++k) {
      const T* state = state_before(k);
      T *at = step_rows(k), *to = state_after(k);
      support_gradient(state, at);
      for (int64_t l = 0; l < layers; ++l) {
        const T *delta = at + step.delta[l], *factor = rates + (k * layers + l) * W;
        if (p.elementwise) {
          gradient_at(l, at);
          step_by_elements(weight(l, state), weight_at[l], p.widths[l] * p.widths[l + 1], load(factor), to);
          step_by_elements(bias(l, state), bias_at[l], p.biased ? p.widths[l + 1] : 0, load(factor), to);
          continue;
        }
        gradient_of(l, support, delta, input(at, l), weight(l, state), factor, to);
        bias_gradient_of(l, support, delta, bias(l, state), factor, to);
      }
    }
    return state_after(steps - 1);
  }
  // of the step with these rows, to `moment`
  void gradient_at(int64_t l, const T* at) const {
    gradient_of(l, support, at + step.delta[l], input(at, l), {}, nullptr, moment);
    bias_gradient_of(l, support, at + step.delta[l], {}, nullptr, moment);
  }
  void step_by_elements(LaneNumbers<T> from, int64_t at, int64_t n, Vec<T> factor, T* to) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to_at = (at + i) * W;
      const Vec<T> before = from.shared ? broadcast(from.base[i]) : load(from.base + i * W);
      store(to + to_at, before + factor * load(element_rates + to_at) * load(moment + to_at));
    }
  }
  void take_layer(int64_t l, const cpu::Operand<T>& w, const cpu::Operand<T>& b, T* to) const {
    take(w, 0, p.widths[l] * p.widths[l + 1], to + weight_at[l] * W);
    if (p.biased) take(b, 0, p.widths[l + 1], to + bias_at[l] * W);
  }
  void write_adapted(const T* state) const {
    for (int64_t l = 0; l < layers; ++l) {
      give(state + weight_at[l] * W, p.widths[l] * p.widths[l + 1], p.fast_weights[l]);
      if (p.biased) give(state + bias_at[l] * W, p.widths[l + 1], p.fast_biases[l]);
    }
  }

  // ---- query rows -------------------------------------------------------------------------------------------------

  void query_pass(const T* state, bool backward) {
    const int64_t outputs = p.widths[layers], inputs = p.widths[0], all = p.query.count;
    Vec<T> total = {};
    for (int64_t begin = 0; begin < all; begin += query_rows) {
      const int64_t n = smaller(query_rows, all - begin);
      take(p.query.x, begin * inputs, n * inputs, query_x);
      take_targets(p.query, begin, n, query_target);
      take(p.query.weight, begin, n, query_weight);
      forward(chunk, query_values, state, n, query_x);
      LaneLoss<T> loss{n, outputs, logits, query_target, query_weight};
      loss.value = p.loss_out != nullptr;
      if (p.logits_out) give(logits, n * outputs, {p.logits_out, all * outputs}, begin * outputs);
      if (backward) {
        loss.delta = query_delta[0];
        loss.scale = numbers;
        const cpu::Operand<T>& g = p.grad_loss;
        store(numbers, g.step ? load_first(g.base + task, count) : broadcast(*g.base));
      }
      total += lane_losses<T>(p.loss, p.delta, loss);
      if (!backward) continue;
      if (p.grad_logits) add_logits_gradient(begin, n);
      query_backward(state, begin, n);
    }
    if (p.loss_out) store_first(p.loss_out + task, total, count);
  }
  void add_logits_gradient(int64_t begin, int64_t n) const {
    const int64_t outputs = p.widths[layers];
    take({p.grad_logits, p.query.count * outputs}, begin * outputs, n * outputs, numbers);
    map_vectors<T>(n * outputs * W, [&](int64_t i) __attribute__((always_inline)) {
      store(query_delta[0] + i, load(query_delta[0] + i) + load(numbers + i));
    });
  }
  void query_backward(const T* state, int64_t begin, int64_t n) {
    const T* before = begin > 0 ? v : nullptr;
    T *delta = query_delta[0], *below = query_delta[1];
    for (int64_t l = layers - 1; l >= 0; --l) {
      const T* in = l == 0 ? query_x : query_values + chunk.value[l];
      gradient_of(l, n, delta, in, before ? weight(l, v) : LaneNumbers<T>{}, nullptr, v);
      bias_gradient_of(l, n, delta, before ? bias(l, v) : LaneNumbers<T>{}, nullptr, v);
      if (l > 0) {
        delta_below(chunk, query_values, l, state, n, delta, below);
        swap(delta, below);
      } else if (p.d_query_x.base) {
        multiply(n, through(0, false, weight(0, state), delta, d_query_x));
        give(d_query_x, n * p.widths[0], p.d_query_x, begin * p.widths[0]);
      }
    }
  }

  // ---- back through the steps --------------------------------------------------------------------------------------

  void sweep() {
    for (int64_t k = steps - 1; k >= 0; --k) {
      T* at = step_rows(k);
      const T* factors = rates + k * layers * W;
      if (p.d_rates.base || (p.elementwise && p.d_weight_rates[0].base)) gradients_of_rates(k, at, factors);
      if (!curvature) continue;
      if (p.elementwise) {
        by_layer([&](int64_t l, int64_t i) __attribute__((always_inline)) {
          store(r + i, load(factors + l * W) * load(element_rates + i) * load(v + i));
        });
        hessian_product(at, state_before(k), r, nullptr);
      } else {
        hessian_product(at, state_before(k), v, factors);
      }
    }
  }
  template <class F>
  void by_layer(const F& f) const {
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t end = l + 1 < layers ? weight_at[l + 1] : size;
      for (int64_t i = weight_at[l] * W; i < end * W; i += W) f(l, i);
    }
  }
  void gradients_of_rates(int64_t k, const T* at, const T* factors) {
    for (int64_t l = 0; l < layers; ++l) {
      gradient_at(l, at);
      const int64_t end = l + 1 < layers ? weight_at[l + 1] : size;
      const Vec<T> factor = load(factors + l * W);
      Vec<T> total = {};
      for (int64_t i = weight_at[l]; i < end;) {  // sums of a few: of all in one row they would lose digits
        Vec<T> part = {};
        for (const int64_t stop = smaller(end, i + 32); i < stop; ++i) {
          Vec<T> product = load(v + i * W) * load(moment + i * W);
          if (p.elementwise) {
            store(d_element_rates + i * W, load(d_element_rates + i * W) + factor * product);
            product *= load(element_rates + i * W);
          }
          part += product;
        }
        total += part;
      }
      store(d_rates + (k * layers + l) * W, -total);
    }
  }

  // v += H direction, where the direction is in `way` (times factors by layer, where given); inputs' gradients too
  void hessian_product(T* at, const T* state, const T* way, const T* factors) {
    for (int64_t l = 0; l < layers; ++l) {
      const bool hidden = l + 1 < layers;
      const T *factor = factors ? factors + l * W : nullptr, *mask = relu && hidden ? at + step.slope[l] : nullptr;
      T* to = mask ? dot_value[l + 1] : dot_z[l];
      LaneProduct<T> along = through(l, true, weight(l, way), input(at, l), to);
      along.factor = factor;
      along.start = bias(l, way);
      if (p.biased && factor) {
        for (int64_t i = 0; i < along.c_row * W; i += W) store(direction + i, load(factor) * load(along.start.base + i));
        along.start = {direction};
      }
      if (l == 0) along.mask = mask;
      multiply(support, along);
      if (l > 0) {
        LaneProduct<T> rest = through(l, true, weight(l, state), dot_value[l], to);
        rest.start = {to};
        rest.start_row = rest.c_row;
        rest.mask = mask;
        multiply(support, rest);
      }
      if (hidden && !relu)
        tangent_through_activation<T>(dot_z[l], at + step.slope[l], step.second[l] >= 0 ? at + step.second[l] : nullptr,
                                      dot_value[l + 1], support * along.c_row * W);
    }
    T *delta = dot_z[layers - 1], *below = dot_delta[0], *other = dot_delta[1];
    lane_curvature<T>(p.loss, support, p.widths[layers], at + step.curvature, row_weight, delta);
    for (int64_t l = layers - 1; l >= 0; --l) {
      const T* plain = at + step.delta[l];
      if (l > 0 || p.d_support_x.base) {
        LaneProduct<T> along = through(l, false, weight(l, way), plain, l > 0 ? below : d_x);
        along.factor = factors ? factors + l * W : nullptr;
        if (l == 0) along.start = {d_x};
        along.start_row = along.c_row;
        multiply(support, along);
        LaneProduct<T> rest = through(l, false, weight(l, state), delta, along.c);
        rest.start = {along.c};
        rest.start_row = rest.c_row;
        if (l > 0 && relu) rest.mask = at + step.slope[l - 1];
        multiply(support, rest);
        if (l > 0 && curved)
          tangent_of_delta<T>(below, at + step.slope[l - 1], dot_z[l - 1], below, support * rest.c_row * W);
      }
      // the way may be v itself: changed only now that it has been read
      gradient_of(l, support, delta, input(at, l), weight(l, v), nullptr, v, l > 0 ? plain : nullptr, dot_value[l]);
      bias_gradient_of(l, support, delta, bias(l, v), nullptr, v);
      T* free = l == layers - 1 ? other : delta;
      delta = below;
      below = free;
    }
  }

  // ---- packs ------------------------------------------------------------------------------------------------------

  void take_gradients() {
    for (int64_t l = 0; l < layers; ++l) take_layer(l, p.grad_weights[l], p.grad_biases[l], v);
  }
  void finish_gradients() {
    if (p.d_support_x.base) give(d_x, support * p.widths[0], p.d_support_x);
    for (int64_t l = 0; l < layers; ++l) {
      finish_layer(l, v, p.d_weights, p.d_biases, sum);
      if (p.elementwise) finish_layer(l, d_element_rates, p.d_weight_rates, p.d_bias_rates, element_sum);
    }
    finish(d_rates, 0, steps * layers, p.d_rates, rates_sum);
  }
  void finish_layer(int64_t l, const T* from, const cpu::Target<T>* weights, const cpu::Target<T>* biases,
                    T* sums) const {
    finish(from, weight_at[l], p.widths[l] * p.widths[l + 1], weights[l], sums);
    if (p.biased) finish(from, bias_at[l], p.widths[l + 1], biases[l], sums);
  }
  void finish(const T* from, int64_t at, int64_t n, const cpu::Target<T>& to, T* sums) const {
    if (!to.base) return;
    if (!to.sum) return give(from + at * W, n, to);
    const IntVec<T> inside = lanes_below<T>(count);
    for (int64_t i = at * W; i < (at + n) * W; i += W) {
      const Vec<T> own = inside ? load(from + i) : Vec<T>{};
      store(sums + i, is_first ? own : load(sums + i) + own);
    }
  }
  // at the end of the range
  void write_sums() {
    task = 0;
    for (int64_t l = 0; l < layers; ++l) {
      write_sums_of_layer(l, sum, p.d_weights, p.d_biases);
      if (p.elementwise) write_sums_of_layer(l, element_sum, p.d_weight_rates, p.d_bias_rates);
    }
    write_sum(rates_sum, steps * layers, p.d_rates);
  }
  void write_sums_of_layer(int64_t l, const T* sums, const cpu::Target<T>* weights,
                           const cpu::Target<T>* biases) const {
    write_sum(sums + weight_at[l] * W, p.widths[l] * p.widths[l + 1], weights[l]);
    if (p.biased) write_sum(sums + bias_at[l] * W, p.widths[l + 1], biases[l]);
  }
  void write_sum(const T* from, int64_t n, const cpu::Target<T>& target) const {
    if (!target.base || !target.sum) return;
    T* to = of_task(target, 0, group);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, from += 4 * W) {
      const auto sums = sums_of_four(load(from), load(from + W), load(from + 2 * W), load(from + 3 * W));
      FM_UNROLL for (int j = 0; j < 4; ++j) to[i + j] = T(sums[j]);
    }
    for (; i < n; ++i, from += W) to[i] = lane_sum<T>(load(from));
  }

  // Tasks [begin, end), a pack at a time.
  void run(int64_t first, int64_t end, int64_t of_group) {
    begin();
    group = of_group;
    for (task = first; task < end; task += W) {
      count = smaller(W, end - task);
      is_first = task == first;
      if (!gradient) {
        const T* state = adapt();
        if (p.query_pass)
          query_pass(state, false);
        else
          write_adapted(state);
        continue;
      }
      if (p.d_support_x.base) fill_zero(d_x, support * p.widths[0] * W);
      if (p.elementwise) fill_zero(d_element_rates, size * W);
      if (p.query_pass || sweeps) {
        const T* state = adapt();
        if (p.query_pass) query_pass(state, true);
      }
      if (!p.query_pass) take_gradients();
      if (sweeps) sweep();
      finish_gradients();
    }
    if (gradient) write_sums();
  }
};

// Whether the tasks were run in packs.
template <class T>
bool ran_in_lanes(const cpu::InnerLoop<T>& p, bool gradient, int64_t begin, int64_t end, int64_t group) {
  LaneLoop<T> loop(p, gradient);
  if (!loop.serves()) return false;
  loop.run(begin, end, group);
  return true;
}

}  // namespace fastmeta::FASTMETA_ISA

// adapt_mlp and meta_loss_mlp, forward and backward, for a range of tasks.
//
// Backward through a step is a Hessian-vector product (Pearlmutter 1994): tangents of all activations and deltas in the
// direction of the adjoint, at the step's own weights.
#pragma once

#include "lanes.h"
#include "worker.h"

namespace fastmeta::FASTMETA_ISA {

template <class T>
struct InnerTask : InnerWorker<T> {
  using Base = InnerWorker<T>;
  using Base::Base;
  using Base::chunk, Base::coefficients, Base::curvature, Base::layers, Base::net, Base::p, Base::relu, Base::step;
  using Base::steps, Base::support, Base::task, Base::group, Base::v, Base::r, Base::u, Base::width, Base::zeros;

  // ---- query rows ---------------------------------------------------------------------------------------------------

  // Logits and loss at `state`; backward also everything that the query rows contribute to, v included.
  void query_pass(const T* state, bool backward) {
    const int64_t outputs = p.widths[layers], count = p.query.count, features = p.widths[p.gram];
    if (backward && count == 0) fill_zero(v, net.size);
    if (backward) fill_zero(seen(), coefficients);
    T total = 0;
    for (int64_t begin = 0; begin < count; begin += this->query_rows) {
      const int64_t n = smaller(this->query_rows, count - begin);
      const T* x = of_task<T>(p.query.x, task) + begin * features;
      if (this->query_padded) x = this->padded_rows(x, n, features, this->query_x);
      const int64_t ldx = this->query_padded ? width[p.gram] : features;
      const T* gram = p.gram ? of_task<T>(p.query.gram, task) + begin * support : nullptr;
      T *values = this->query_values, *logits = this->spread;
      this->forward(chunk, values, state, n, x, ldx, gram, true, logits);
      LossRows<T> loss{n, outputs, width[layers], logits};
      loss.labels = of_task<T>(p.query.labels, task) + (p.query.labels.base ? begin : 0);
      loss.target = of_task<T>(p.query.target, task) + (p.query.target.base ? begin * outputs : 0);
      loss.paths = &p.query.paths;
      loss.room = this->path_room;
      loss.weight = of_task<T>(p.query.weight, task) + begin;
      loss.value = p.loss_out != nullptr;
      if (loss.value) this->unpad(logits, n, outputs, p.logits_out + (task * count + begin) * outputs);
      if (backward) {
        loss.delta = this->query_delta[0];
        loss.weight_scale = *of_task<T>(p.grad_loss, task);
      }
      total += row_losses<T>(p.loss, p.delta, loss);
      if (!backward) continue;
      if (p.grad_logits) add_logits_gradient(begin, n, loss.delta);
      query_backward(state, values, begin, n, x, ldx, gram);
    }
    if (p.loss_out) p.loss_out[task] = total;
  }

  void add_logits_gradient(int64_t begin, int64_t n, T* delta) const {
    const int64_t outputs = p.widths[layers];
    const T* g = p.grad_logits + (task * p.query.count + begin) * outputs;
    for (int64_t i = 0; i < n; ++i, g += outputs, delta += width[layers])
      for (int64_t j = 0; j < outputs; j += kWidth<T>)
        store(delta + j, load(delta + j) + load_first(g + j, smaller(kWidth<T>, outputs - j)));
  }

  void query_backward(const T* state, T* values, int64_t begin, int64_t n, const T* x, int64_t ldx, const T* gram) {
    T *delta = this->query_delta[0], *next = this->query_delta[1];
    for (int64_t l = layers - 1; l >= net.first; --l) {
      const InnerLayer& a = net.layer[l];
      const T* input = l == 0 ? x : values + chunk.value[l];
      const int64_t ld = l == 0 ? ldx : width[l];
      const bool adds = begin > 0;
      add_gradient<T>(a, n, delta, input, ld, nullptr, nullptr, adds ? v + a.weight : zeros, adds ? a.np : 0, T(1),
                      v + a.weight);
      if (p.biased) add_column_sums(n, width[l + 1], delta, adds ? v + a.bias : zeros, T(1), v + a.bias);
      if (l > 0) {
        through_layer<T>(a, false, a.query_copied, n, {delta, width[l + 1], state}, {}, T(1), next, zeros, 0,
                         {false, relu ? values + chunk.slope[l - 1] : nullptr});
        this->pass_activation(chunk, values, l - 1, n, next);
        T* swap = delta;
        delta = next;
        next = swap;
      } else if (p.d_query_x.base) {
        through_layer<T>(a, false, a.query_copied, n, {delta, width[1], state}, {}, T(1), this->d_query_x, zeros, 0);
        this->unpad(this->d_query_x, n, p.widths[0],
                    of_task(p.d_query_x, task, group) + begin * p.widths[0]);
      }
    }
    if (!p.gram) return;
    if (p.d_query_x.base)
      this->unpad(delta, n, p.widths[1], of_task(p.d_query_x, task, group) + begin * p.widths[1]);
    add_gram_transposed(n, gram, delta);
    if (p.d_gram_query.base) {
      T* out = of_task(p.d_gram_query, task, group) + begin * support;
      fill_zero(out, n * support);
      subtract_outer(n, delta, state + net.whole, out);
    }
  }

  // ---- the first layer in the Gram form: its adjoint as what the support rows see of it -----------------------------

  T* seen() const { return v + net.whole; }

  void add_gram_transposed(int64_t n, const T* gram, const T* delta) const {
    Product<T> product;
    product.c = seen();
    product.start = seen();
    product.ldc = product.start_row = width[1];
    product.term = {gram, 1, support, delta, width[1], n};
    multiply_along(support, width[1], product);
  }
  // out [n, support] -= rows [n, width] C^T
  void subtract_outer(int64_t n, const T* rows, const T* c, T* out) const {
    Product<T> product;
    product.c = out;
    product.start = out;
    product.ldc = product.start_row = support;
    product.factor = -1;
    product.term = {rows, width[1], 1, c, width[1], width[1]};
    multiply_across(n, support, product);
  }

  // ---- back through the steps --------------------------------------------------------------------------------------

  void sweep() {
    if (!this->plain) fill_zero(u, this->moment_size);
    for (int64_t s = this->segments - 1; s >= 0 && steps > 0; --s) {
      if (s + 1 < this->segments) this->run_again(s);
      const int64_t begin = s * this->segment, end = smaller(steps, begin + this->segment);
      for (int64_t k = end - 1; k >= begin; --k) step_back(s, k, k - begin);
    }
  }

  void step_back(int64_t s, int64_t k, int64_t i) {
    const T *state = this->state(s, i), *rates = of_task<T>(p.rates, task) + k * layers;
    T* at = this->step_rows(i);
    const bool element_gradient = p.d_weight_rates[net.first].base != nullptr && p.elementwise;
    if (p.d_rates.base || element_gradient) {
      const T* moment = this->moments + (i + 1) * this->moment_size;
      if (p.momentum == 0) {
        this->next_moment(at, state, nullptr, this->moment);
        moment = this->moment;
      }
      gradients_of_rates(rates, moment, k, element_gradient);
    }
    if (this->plain) {
      // the direction is -rate * v, left as a factor where v is multiplied
      for (int64_t l = net.first; l < layers && p.biased; ++l) {
        const T *from = v + net.layer[l].bias, rate = rates[l];
        T* to = r + net.layer[l].bias;
        for (int64_t j = 0; j < width[l + 1]; j += kWidth<T>) store(to + j, -rate * load(from + j));
      }
      if (curvature) {
        net.transpose_copies(v, false);
        hessian_product(at, state, v, rates);
      }
      return;
    }
    direction(rates);
    if (curvature) {
      net.transpose_copies(r, false);
      hessian_product(at, state, r, nullptr);
    }
  }

  // r = u - rates * v;  u = momentum * r;  v += weight_decay * r
  void direction(const T* rates) {
    const auto one = [&](T* a, T* b, T* c, Vec<T> rate) __attribute__((always_inline)) {
      const Vec<T> adjoint = load(a), all = load(c) - rate * adjoint;
      store(b, all);
      store(c, p.momentum * all);
      store(a, adjoint + p.weight_decay * all);
    };
    this->by_layer([&](int64_t l, int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = begin; i < end; i += kWidth<T>) {
        const Vec<T> rate = broadcast(rates[l]);
        one(v + i, r + i, u + i, p.elementwise ? rate * load(this->element_rates + i) : rate);
      }
    });
    // no weight decay here: the caller sees to it
    T *a = seen(), *b = r + net.whole, *c = u + net.size;
    for (int64_t i = 0; i < coefficients; i += kWidth<T>) one(a + i, b + i, c + i, broadcast(rates[0]));
  }

  void gradients_of_rates(const T* rates, const T* moment, int64_t k, bool element_gradient) {
    T* d_rates = p.d_rates.base ? of_task(p.d_rates, task, group) + k * layers : nullptr;
    this->by_layer([&](int64_t l, int64_t begin, int64_t end) {
      Vec<T> sums = {};
      for (int64_t i = begin; i < end; i += kWidth<T>) {
        const Vec<T> product = load(v + i) * load(moment + i);
        if (element_gradient) store(this->d_element_rates + i, load(this->d_element_rates + i) - rates[l] * product);
        sums += p.elementwise ? product * load(this->element_rates + i) : product;
      }
      if (d_rates) d_rates[l] -= lane_sum<T>(sums);
    });
    if (p.gram && d_rates) d_rates[0] -= dot_product<T>(seen(), moment + net.size, coefficients);
  }

  // v += H direction, where the direction is in `along` (times -rates, where given); inputs' gradients on the way
  void hessian_product(const T* at, const T* state, const T* along, const T* rates) {
    T** dot_value = this->dot_value;
    T** dot_z = this->dot_z;
    const auto scale = [&](int64_t l) { return rates ? -rates[l] : T(1); };
    for (int64_t l = 0; l < layers; ++l) {
      const bool hidden = l + 1 < layers;
      // relu's tangent is formed with the product's store: nothing more is needed of z
      const ReluStore<T> end{false, relu && hidden ? at + step.slope[l] : nullptr};
      T* to = relu && hidden ? dot_value[l + 1] : dot_z[l];
      if (l < net.first) {
        const T *from = along + net.whole, factor = scale(0);
        map_vectors<T>(coefficients, [&](int64_t i) __attribute__((always_inline)) {
          const Vec<T> z = factor * load(from + i);
          store(to + i, end.mask ? where_active(load(end.mask + i), z) : z);
        });
      } else {
        const InnerLayer& a = net.layer[l];
        const T* bias = r + a.bias;
        const Factor<T> value{this->input(at, l), this->ld_input(l), along};
        if (l == 0)  // the input has no tangent
          through_layer<T>(a, true, a.copied, support, value, {}, T(1), to, bias, 0, end, scale(l));
        else
          through_layer<T>(a, true, a.copied, support, {dot_value[l], width[l], state}, value, scale(l), to, bias, 0,
                           end);
      }
      if (hidden && !relu)
        tangent_through_activation<T>(dot_z[l], at + step.slope[l], step.second[l] >= 0 ? at + step.second[l] : nullptr,
                                      dot_value[l + 1], support * width[l + 1]);
    }
    T *delta = dot_z[layers - 1], *next = this->dot_delta[0], *other = this->dot_delta[1];
    const T *curve = at + step.curvature, *weight = of_task<T>(p.support.weight, task);
    if (p.loss == cpu::kMaximumEntropy)
      times_path_curvature<T>(p.support.paths, of_task<T>(p.support.target, task), support, width[layers], curve, weight,
                              delta, this->path_room);
    else
      times_curvature<T>(p.loss, support, width[layers], curve, weight, delta);
    for (int64_t l = layers - 1; l >= net.first; --l) {
      const InnerLayer& a = net.layer[l];
      const T* plain_delta = at + step.delta[l];
      if (l > 0) {
        through_layer<T>(a, false, a.copied, support, {delta, width[l + 1], state}, {plain_delta, width[l + 1], along},
                         scale(l), next, zeros, 0, {false, relu ? at + step.slope[l - 1] : nullptr});
        if (this->curved) tangent_of_delta<T>(next, at + step.slope[l - 1], dot_z[l - 1], next, support * width[l]);
      } else if (p.d_support_x.base) {
        through_layer<T>(a, false, a.copied, support, {delta, width[1], state}, {plain_delta, width[1], along},
                         scale(0), this->d_support_x, this->d_support_x, width[0]);
      }
      // along may be v itself: changed only now that it has been read
      add_gradient<T>(a, support, delta, this->input(at, l), this->ld_input(l), l > 0 ? plain_delta : nullptr,
                      l > 0 ? dot_value[l] : nullptr, v + a.weight, a.np, T(1), v + a.weight);
      if (p.biased) add_column_sums(support, width[l + 1], delta, v + a.bias, T(1), v + a.bias);
      T* swap = l == layers - 1 ? other : delta;
      delta = next;
      next = swap;
    }
    if (!p.gram) return;
    if (p.d_support_x.base)
      map_vectors<T>(coefficients, [&](int64_t i) __attribute__((always_inline)) {
        store(this->d_support_x + i, load(this->d_support_x + i) + load(delta + i));
      });
    add_gram_transposed(support, of_task<T>(p.support.gram, task), delta);
    if (p.d_gram_support.base)
      subtract_outer(support, delta, state + net.whole, of_task(p.d_gram_support, task, group));
  }

  // ---- tasks -------------------------------------------------------------------------------------------------------

  void write_adapted(const T* state) const {
    for (int64_t l = net.first; l < layers; ++l) {
      net.unpack_weight(net.layer[l], state, of_task(p.fast_weights[l], task, group));
      if (p.biased) net.unpack_bias(net.layer[l], state, of_task(p.fast_biases[l], task, group));
    }
    if (p.gram) this->unpad(state + net.whole, support, p.widths[1], of_task(p.coefficients, task, group));
  }
  void take_gradients() {
    for (int64_t l = net.first; l < layers; ++l)
      net.pack(net.layer[l], of_task<T>(p.grad_weights[l], task),
               p.biased ? of_task<T>(p.grad_biases[l], task) : nullptr, v);
    const T* g = of_task<T>(p.grad_coefficients, task);
    for (int64_t i = 0; i < support && p.gram; ++i) {
      T* to = seen() + i * width[1];
      InnerNet<T>::copy_padded(g + i * p.widths[1], p.widths[1], to, width[1]);
      for (int64_t j = 0; j < width[1]; ++j) to[j] = -to[j];
    }
  }

  void start_gradients() {
    if (p.d_support_x.base) fill_zero(this->d_support_x, support * width[p.gram]);
    if (p.d_gram_support.base) fill_zero(of_task(p.d_gram_support, task, group), support * support);
    if (p.d_rates.base && !p.d_rates.sum) fill_zero(of_task(p.d_rates, task, group), steps * layers);
    if (p.elementwise) fill_zero(this->d_element_rates, net.size);
  }
  void finish_gradients() {
    if (p.d_support_x.base)
      this->unpad(this->d_support_x, support, p.widths[p.gram], of_task(p.d_support_x, task, group));
    write(p.d_weights, p.d_biases, v, this->sum, false);
    if (p.elementwise) write(p.d_weight_rates, p.d_bias_rates, this->d_element_rates, this->element_sum, false);
  }
  // sums are kept as the layers are, and written out at the end of the range
  void write(const cpu::Target<T>* weights, const cpu::Target<T>* biases, const T* block, T* sums, bool end) const {
    const auto add = [&](int64_t from, int64_t n) {
      map_vectors<T>(n, [&](int64_t i) __attribute__((always_inline)) {
        store(sums + from + i, load(sums + from + i) + load(block + from + i));
      });
    };
    for (int64_t l = net.first; l < layers; ++l) {
      const InnerLayer& a = net.layer[l];
      if (weights[l].base) {
        if (weights[l].sum && !end) add(a.weight, a.m * a.np);
        if (weights[l].sum == end) net.unpack_weight(a, end ? sums : block, of_task(weights[l], task, group));
      }
      if (p.biased && biases[l].base) {
        if (biases[l].sum && !end) add(a.bias, width[l + 1]);
        if (biases[l].sum == end) net.unpack_bias(a, end ? sums : block, of_task(biases[l], task, group));
      }
    }
  }
};

template <class T>
void inner_loop(const cpu::InnerLoop<T>& p, int64_t begin, int64_t end, int64_t group) {
  if (ran_in_lanes(p, false, begin, end, group)) return;
  InnerTask<T> t(p, false);
  t.group = group;
  for (t.task = begin; t.task < end; ++t.task) {
    const T* state = t.adapt();
    if (p.query_pass)
      t.query_pass(state, false);
    else
      t.write_adapted(state);
  }
}

template <class T>
void inner_loop_gradient(const cpu::InnerLoop<T>& p, int64_t begin, int64_t end, int64_t group) {
  if (ran_in_lanes(p, true, begin, end, group)) return;
  InnerTask<T> t(p, true);
  t.group = group;
  for (t.task = begin; t.task < end; ++t.task) {
    t.start_gradients();
    if (p.query_pass || t.sweeps) {
      const T* state = t.adapt();
      if (p.query_pass) t.query_pass(state, true);
    }
    if (!p.query_pass) t.take_gradients();
    if (t.sweeps) t.sweep();
    t.finish_gradients();
  }
  t.task = 0;
  t.write(p.d_weights, p.d_biases, nullptr, t.sum, true);
  if (p.elementwise) t.write(p.d_weight_rates, p.d_bias_rates, nullptr, t.element_sum, true);
}

}  // namespace fastmeta::FASTMETA_ISA

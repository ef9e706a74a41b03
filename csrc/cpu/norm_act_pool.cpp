// norm_moments and norm_act_pool on CPU tensors. A unit is what shares its mean and variance: the images of a task, or
// one image. Units are split in blocks of the same size for any number of threads, so that sums have the same bits.
#include "tensors.h"

#include <cmath>

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "norm_act_pool";
constexpr int64_t kBlockPixels = 512;
constexpr int64_t kPad = 16;  // numbers of the longest vector

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  int64_t tasks, images, height, width, channels, padded;
  bool by_image;  // a unit is one image
  int64_t units, unit_images;

  Shape(const Tensor& x, int64_t norm) : by_image(norm == kGroupNorm) {
    check_dims(kOp, x, 5);
    tasks = x.size(0);
    images = x.size(1);
    height = x.size(2);
    width = x.size(3);
    channels = x.size(4);
    padded = divide_up(channels, kPad) * kPad;
    units = by_image ? tasks * images : tasks;
    unit_images = by_image ? 1 : images;
  }
  int64_t image() const { return height * width * channels; }
  int64_t unit_pixels() const { return unit_images * height * width; }
  int64_t task_of(int64_t unit) const { return by_image ? unit / images : unit; }
};

// ---- mean and variance

template <class T>
void find_moments(const Shape& s, int64_t groups, const T* x, T* mean, T* var) {
  const int64_t pixels = s.unit_pixels(), blocks = std::max<int64_t>(1, divide_up(pixels, kBlockPixels));
  const int64_t span = groups ? s.channels / groups : 0, width = s.channels;
  std::vector<T> found(size_t(s.units * blocks * 2 * width));
  const auto at = [&](int64_t unit, int64_t block) { return found.data() + (unit * blocks + block) * 2 * width; };
  const auto size_of = [&](int64_t block) { return std::min(kBlockPixels, pixels - block * kBlockPixels); };
  parallel(s.units * blocks, 8 * std::min(pixels, kBlockPixels) * width, [&](int64_t i) {
    const int64_t unit = i / blocks, block = i % blocks;
    if (pixels == 0) return;
    T* to = at(unit, block);
    kernels<T>().norm_moments(
        {x + (unit * pixels + block * kBlockPixels) * width, size_of(block), width, to, to + width});
  });
  parallel(s.units, 4 * blocks * width, [&](int64_t unit) {
    const double count = double(pixels) * double(span);
    std::vector<double> sums(size_t(2 * groups));
    double *first = sums.data(), *second = first + groups;
    const auto each = [&](const auto& f) {
      for (int64_t block = 0; block < blocks && pixels > 0; ++block) {
        const T *from = x + (unit * pixels + block * kBlockPixels) * width, *of_block = at(unit, block);
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t c = g * span; c < (g + 1) * span; ++c) {
            const double base = std::isfinite(from[c]) ? double(from[c]) : 0;
            f(g, double(size_of(block)), base + double(of_block[c]), double(of_block[width + c]));
          }
      }
    };
    each([&](int64_t g, double n, double middle, double) { first[g] += n * middle; });
    for (int64_t g = 0; g < groups; ++g) first[g] /= count;
    each([&](int64_t g, double n, double middle, double squares) {
      second[g] += squares + n * (middle - first[g]) * (middle - first[g]);
    });
    for (int64_t g = 0; g < groups; ++g) {
      mean[unit * groups + g] = T(first[g]);
      var[unit * groups + g] = T(second[g] / count);
    }
  });
}

std::tuple<Tensor, Tensor> norm_moments(Tensor x, int64_t norm, int64_t groups) {
  const Shape s(x, norm);
  STD_TORCH_CHECK(norm == kBatchNorm || norm == kGroupNorm, kOp, ": moments are of norm batch or group");
  if (norm == kBatchNorm) groups = s.channels;
  STD_TORCH_CHECK(groups > 0 ? s.channels % groups == 0 : s.channels == 0, kOp, ": ", groups, " groups of ",
                  s.channels, " channels");
  Tensor mean = new_tensor(x, {s.tasks, s.by_image ? s.images : 1, groups});
  Tensor var = new_tensor(x, {s.tasks, s.by_image ? s.images : 1, groups});
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    find_moments<T>(s, groups, data<T>(x), mutable_data<T>(mean), mutable_data<T>(var));
  });
  return {mean, var};
}

// ---- the block

struct Options {
  int64_t norm, groups;
  double eps;
  int64_t activation;
  double slope;
  int64_t pool;
};

// One number for each channel of each task, or of all; `missing` where there is no tensor.
template <class T>
struct Affine {
  const T* base = nullptr;
  int64_t step = 0, lead = 0;
  T missing;

  Affine(const std::vector<Tensor>& given, const Shape& s, T missing) : missing(missing) {
    if (given.empty()) return;
    const Tensor& t = given[0];
    check_dims(kOp, t, 2);
    lead = t.size(0);
    STD_TORCH_CHECK((lead == s.tasks || lead == 1) && t.size(1) == s.channels, kOp,
                    ": weight and bias need a number for each channel, of each task or of all");
    base = data<T>(t);
    step = lead == 1 ? 0 : s.channels;
  }
  T at(int64_t task, int64_t c) const { return base ? base[task * step + c] : missing; }
};

template <class T>
struct Problem {
  Shape s;
  Options o;
  int64_t step, lines, unit_lines, block_lines, blocks, out_image;
  int64_t groups = 0, span = 1, moment_rows = 1, moment_lead = 1;
  bool constant;
  const T *x, *mean = nullptr, *var = nullptr;
  Affine<T> weight, bias;

  Problem(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
          const std::vector<Tensor>& moments, const Options& options)
      : s(input, options.norm), o(options), x(data<T>(input)), weight(weights, s, T(1)), bias(biases, s, T(0)) {
    step = o.pool == kNoPool ? 1 : 2;
    lines = divide_up(s.height, step);
    unit_lines = s.unit_images * lines;
    block_lines = std::max<int64_t>(1, kBlockPixels / std::max<int64_t>(1, step * s.width));
    blocks = divide_up(unit_lines, block_lines);
    out_image = (s.height / step) * (s.width / step) * s.channels;
    constant = o.norm == kNoNorm || o.norm == kGivenNorm;
    if (o.norm == kNoNorm) return;
    STD_TORCH_CHECK(moments.size() == 2, kOp, ": needs mean and variance");
    for (const Tensor& t : moments) check_dims(kOp, t, 3);
    moment_lead = moments[0].size(0);
    moment_rows = moments[0].size(1);
    groups = moments[0].size(2);
    STD_TORCH_CHECK((moment_lead == s.tasks || moment_lead == 1) && moment_rows == (s.by_image ? s.images : 1) &&
                        (groups > 0 ? s.channels % groups == 0 : s.channels == 0),
                    kOp, ": moments do not fit x");
    mean = data<T>(moments[0]);
    var = data<T>(moments[1]);
    span = groups ? s.channels / groups : 1;
  }

  // of the moments of a unit's channel
  int64_t moment(int64_t unit, int64_t c) const {
    const int64_t task = moment_lead == 1 ? 0 : s.task_of(unit), row = s.by_image ? unit % s.images : 0;
    return (task * moment_rows + row) * groups + c / span;
  }
  double rate(int64_t unit, int64_t c) const { return mean ? 1 / std::sqrt(double(var[moment(unit, c)]) + o.eps) : 1; }
  double weight_at(int64_t unit, int64_t c) const { return weight.at(s.task_of(unit), c); }

  // rows 0 to 2 of a unit's tables
  void fill(int64_t unit, T* table) const {
    for (int64_t c = 0; c < s.channels; ++c) {
      table[c] = mean ? mean[moment(unit, c)] : T(0);
      table[s.padded + c] = T(rate(unit, c) * weight_at(unit, c));
      table[2 * s.padded + c] = bias.at(s.task_of(unit), c);
    }
  }
  NormBlock<T> block(int64_t unit, int64_t i, const T* tables) const {
    NormBlock<T> block{s.height, s.width, s.channels, s.padded};
    block.first = i * block_lines;
    block.last = std::min(unit_lines, block.first + block_lines);
    block.activation = o.activation;
    block.pool = o.pool;
    block.slope = T(o.slope);
    block.constant = constant;
    block.x = x + unit * s.unit_images * s.image();
    block.tables = tables;
    return block;
  }
  int64_t cost() const {  // of a block
    return block_lines * step * s.width * s.channels * (o.activation == kGelu || o.activation == kSilu ? 32 : 4);
  }
  int64_t outputs(int64_t unit) const { return unit * s.unit_images * out_image; }
  int64_t inputs(int64_t unit) const { return unit * s.unit_images * s.image(); }
};

// Rows of numbers by channel, 0 at first.
template <class T>
struct Rows {
  std::vector<T> numbers;
  int64_t each;
  Rows(int64_t count, int64_t rows, int64_t padded) : numbers(size_t(count * rows * padded)), each(rows * padded) {}
  T* at(int64_t i) { return numbers.data() + i * each; }
};

// sums(block), finish(), write(block) of every unit: the same unit's one after the other, while it is in the cache; its
// blocks side by side where threads would otherwise have unlike shares.
template <class Sums, class Finish, class Write>
void unit_by_unit(int64_t units, int64_t blocks, int64_t cost, const Sums& sums, const Finish& finish,
                  const Write& write) {
  const int64_t threads = torch::stable::get_num_threads();
  if (units % threads == 0 || units >= 4 * threads)
    return parallel(units, 2 * blocks * cost, [&](int64_t unit) {
      for (int64_t i = 0; i < blocks; ++i) sums(unit, i);
      finish(unit);
      for (int64_t i = 0; i < blocks; ++i) write(unit, i);
    });
  for (int64_t unit = 0; unit < units; ++unit) {
    parallel(blocks, cost, [&](int64_t i) { sums(unit, i); });
    finish(unit);
    parallel(blocks, cost, [&](int64_t i) { write(unit, i); });
  }
}

// The sum of a unit's blocks into the first of them.
template <class T>
void add_up(Rows<T>& rows, int64_t first, int64_t blocks) {
  if (blocks > 0) kernels<T>().sum_partials(rows.at(first), blocks, rows.each, rows.at(first), rows.each);
}

// Gradients by channel, `[lead, C]`: of(unit, channel) added up over the units that share a number.
template <class T, class F>
void add_units(const Problem<T>& p, int64_t lead, T* to, const F& of) {
  const int64_t units = p.s.units / std::max<int64_t>(lead, 1);
  parallel(lead, units * p.s.channels * 4, [&](int64_t t) {
    std::vector<double> sum(size_t(p.s.channels));
    for (int64_t unit = t * units; unit < (t + 1) * units; ++unit)
      for (int64_t c = 0; c < p.s.channels; ++c) sum[size_t(c)] += of(unit, c);
    for (int64_t c = 0; c < p.s.channels; ++c) to[t * p.s.channels + c] = T(sum[size_t(c)]);
  });
}

Tensor norm_act_pool(Tensor x, std::vector<Tensor> weight, std::vector<Tensor> bias, std::vector<Tensor> moments,
                     int64_t norm, int64_t groups, double eps, int64_t activation, double slope, int64_t pool) {
  const int64_t step = pool == kNoPool ? 1 : 2;
  check_dims(kOp, x, 5);
  Tensor out = new_tensor(x, {x.size(0), x.size(1), x.size(2) / step, x.size(3) / step, x.size(4)});
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, weight, bias, moments, {norm, groups, eps, activation, slope, pool});
    Rows<T> tables(p.s.units, 3, p.s.padded);
    parallel(p.s.units, p.s.channels * 16, [&](int64_t unit) { p.fill(unit, tables.at(unit)); });
    T* to = mutable_data<T>(out);
    parallel(p.s.units * p.blocks, p.cost(), [&](int64_t i) {
      const int64_t unit = i / p.blocks;
      NormBlock<T> block = p.block(unit, i % p.blocks, tables.at(unit));
      block.out = to + p.outputs(unit);
      kernels<T>().norm_forward(block);
    });
  });
  return out;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> norm_act_pool_bwd(
    Tensor grad, Tensor x, std::vector<Tensor> weight, std::vector<Tensor> bias, std::vector<Tensor> moments,
    int64_t norm, int64_t groups, double eps, int64_t activation, double slope, int64_t pool, int64_t needs) {
  check_dims(kOp, grad, 5);
  Tensor dx = new_like(x, needs & 1);
  std::vector<Tensor> d_weight, d_bias;
  for (const Tensor& t : weight) d_weight.push_back(new_like(t, needs & 2));
  for (const Tensor& t : bias) d_bias.push_back(new_like(t, needs & 4));
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, weight, bias, moments, {norm, groups, eps, activation, slope, pool});
    const bool wants_weight = (needs & 2) && !weight.empty(), wants_bias = (needs & 4) && !bias.empty();
    const bool wants_sums = wants_weight || wants_bias || !p.constant;
    const int64_t padded = p.s.padded;
    Rows<T> tables(p.s.units, 5, padded), sums(wants_sums ? p.s.units * p.blocks : 0, 2, padded);
    parallel(p.s.units, p.s.channels * 16, [&](int64_t unit) { p.fill(unit, tables.at(unit)); });
    const T* g = data<T>(grad);
    T* to = needs & 1 ? mutable_data<T>(dx) : nullptr;
    const auto block_of = [&](int64_t unit, int64_t i) {
      NormBlock<T> block = p.block(unit, i, tables.at(unit));
      block.grad = g + p.outputs(unit);
      return block;
    };
    unit_by_unit(
        p.s.units, p.blocks, 2 * p.cost(),
        [&](int64_t unit, int64_t i) {
          if (!wants_sums) return;
          NormBlock<T> block = block_of(unit, i);
          block.sums = sums.at(unit * p.blocks + i);
          kernels<T>().norm_sums(block);
        },
        [&](int64_t unit) {
          if (!wants_sums) return;
          add_up(sums, unit * p.blocks, p.blocks);
          if (p.constant || p.blocks == 0) return;
          const T* sum = sums.at(unit * p.blocks);
          T* table = tables.at(unit);
          const double count = double(p.s.unit_pixels()) * double(p.span);
          for (int64_t begin = 0; begin < p.s.channels; begin += p.span) {
            const double r = p.rate(unit, begin);
            double of_g = 0, of_gn = 0;  // means over the group, times weight
            for (int64_t c = begin; c < begin + p.span; ++c) {
              of_g += p.weight_at(unit, c) * sum[c] / count;
              of_gn += p.weight_at(unit, c) * r * sum[padded + c] / count;
            }
            for (int64_t c = begin; c < begin + p.span; ++c) {
              table[3 * padded + c] = T(-r * of_g);
              table[4 * padded + c] = T(-r * r * of_gn);
            }
          }
        },
        [&](int64_t unit, int64_t i) {
          if (to == nullptr) return;
          NormBlock<T> block = block_of(unit, i);
          block.out = to + p.inputs(unit);
          kernels<T>().norm_gradient(block);
        });
    const auto sum_of = [&](int64_t unit) { return sums.at(unit * p.blocks); };
    const auto any = [&] { return p.blocks > 0; };
    if (wants_weight)
      add_units(p, p.weight.lead, mutable_data<T>(d_weight[0]), [&](int64_t unit, int64_t c) {
        return any() ? p.rate(unit, c) * sum_of(unit)[padded + c] : 0.0;
      });
    if (wants_bias)
      add_units(p, p.bias.lead, mutable_data<T>(d_bias[0]),
                [&](int64_t unit, int64_t c) { return any() ? double(sum_of(unit)[c]) : 0.0; });
  });
  return {dx, d_weight, d_bias};
}

// From a unit's sums over pixels (`NormSecondSums`) the tables of `NormSecond`, and its part of the gradients of weight and
// bias. With g the gradient at z, w the weight, r the rate 1 / sqrt(var + eps), n = r d, means over a group of channels:
//   q = dL/dg = w r (v - mean v - n a) + v_weight n + v_bias,   a = mean(v n),  b = mean(w g n)
//   e = dL/dn = -r (b v + a w g) + v_weight g + w u,            u = q grad act''
//   d_x = r (e - mean e - n mean(e n)) - r^2 n S / N,           S = sum(w v g) - N (mean(w g) mean v + a b)
template <class T, class Sum>
void second_tables(const Problem<T>& p, int64_t unit, bool curved, const Sum& sum, const Affine<T>& v_weight,
                   const Affine<T>& v_bias, T* table, double* of_affine) {
  const int64_t padded = p.s.padded, task = p.s.task_of(unit);
  const double count = double(p.s.unit_pixels()) * double(p.span);
  for (int64_t begin = 0; begin < p.s.channels; begin += p.span) {
    const double r = p.rate(unit, begin);
    double v = 0, a = 0, h = 0, b = 0, s = 0;  // h: mean of w g
    for (int64_t c = begin; c < begin + p.span && !p.constant; ++c) {
      const double w = p.weight_at(unit, c);
      v += sum(0, c) / count;
      a += r * sum(1, c) / count;
      h += w * sum(2, c) / count;
      b += w * r * sum(3, c) / count;
      s += w * sum(4, c);
    }
    s -= count * (h * v + a * b);
    double e = -r * (b * v + a * h), en = -2 * r * a * b;  // means of e and e n
    for (int64_t c = begin; c < begin + p.span; ++c) {
      const double w = p.weight_at(unit, c), vw = v_weight.at(task, c);
      const double of_v = w * r, of_d = r * (vw - w * r * a), rest = v_bias.at(task, c) - w * r * v;  // in q
      const double u = curved ? of_v * sum(8, c) + of_d * sum(6, c) + rest * sum(5, c) : 0;
      const double ud = curved ? of_v * sum(9, c) + of_d * sum(7, c) + rest * sum(6, c) : 0;
      e += (vw * sum(2, c) + w * u) / count;
      en += r * (vw * sum(3, c) + w * ud) / count;
      of_affine[c] = r * (sum(4, c) - v * sum(2, c) - a * r * sum(3, c) + ud);
      of_affine[p.s.channels + c] = u;
      table[3 * padded + c] = T(of_d);
      table[4 * padded + c] = T(rest);
    }
    for (int64_t c = begin; c < begin + p.span && !p.constant; ++c) {
      table[5 * padded + c] = T(-r * r * b);
      table[6 * padded + c] = T(-r * e);
      table[7 * padded + c] = T(-r * r * (en + r * s / count));
    }
  }
}

// With `outer` the gradient of d_x, `outer_weight` and `outer_bias` those of d_weight and d_bias.
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> norm_act_pool_bwd_bwd(
    Tensor outer, std::vector<Tensor> outer_weight, std::vector<Tensor> outer_bias, Tensor grad, Tensor x,
    std::vector<Tensor> weight, std::vector<Tensor> bias, std::vector<Tensor> moments, int64_t norm, int64_t groups,
    double eps, int64_t activation, double slope, int64_t pool, int64_t needs, int64_t second_needs) {
  check_dims(kOp, grad, 5);
  Tensor d_grad = new_like(grad, second_needs & 1), dx = new_like(x, second_needs & 2);
  std::vector<Tensor> d_weight, d_bias;
  for (const Tensor& t : weight) d_weight.push_back(new_like(t, second_needs & 4));
  for (const Tensor& t : bias) d_bias.push_back(new_like(t, second_needs & 8));
  by_dtype(kOp, x, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> p(x, weight, bias, moments, {norm, groups, eps, activation, slope, pool});
    const Affine<T> v_weight(needs & 2 ? outer_weight : std::vector<Tensor>{}, p.s, T(0));
    const Affine<T> v_bias(needs & 4 ? outer_bias : std::vector<Tensor>{}, p.s, T(0));
    const bool wants_weight = (second_needs & 4) && !weight.empty(), wants_bias = (second_needs & 8) && !bias.empty();
    const bool curved = activation == kGelu || activation == kSilu, writes = second_needs & 3;
    const bool wants_sums = wants_weight || wants_bias || !p.constant;
    const int64_t padded = p.s.padded, channels = p.s.channels;
    Rows<T> tables(p.s.units, 8, padded), sums(wants_sums ? p.s.units * p.blocks : 0, curved ? 10 : 5, padded);
    Rows<double> of_affine(p.s.units, 2, channels);
    const T *g = data<T>(grad), *v = needs & 1 ? data<T>(outer) : nullptr;
    T* to_grad = second_needs & 1 ? mutable_data<T>(d_grad) : nullptr;
    T* to_x = second_needs & 2 ? mutable_data<T>(dx) : nullptr;
    parallel(p.s.units, channels * 16, [&](int64_t unit) { p.fill(unit, tables.at(unit)); });
    const auto block_of = [&](int64_t unit, int64_t i) {
      NormBlock<T> block = p.block(unit, i, tables.at(unit));
      block.grad = g + p.outputs(unit);
      block.outer = v ? v + p.inputs(unit) : nullptr;
      return block;
    };
    unit_by_unit(
        p.s.units, p.blocks, (curved ? 4 : 3) * p.cost(),
        [&](int64_t unit, int64_t i) {
          if (!wants_sums) return;
          NormBlock<T> block = block_of(unit, i);
          block.sums = sums.at(unit * p.blocks + i);
          kernels<T>().norm_second_sums(block);
        },
        [&](int64_t unit) {
          if (wants_sums) add_up(sums, unit * p.blocks, p.blocks);
          if (p.blocks == 0) return;
          const auto sum = [&](int64_t k, int64_t c) {
            return wants_sums ? double(sums.at(unit * p.blocks)[k * padded + c]) : 0.0;
          };
          second_tables<T>(p, unit, curved, sum, v_weight, v_bias, tables.at(unit), of_affine.at(unit));
        },
        [&](int64_t unit, int64_t i) {
          if (!writes) return;
          NormBlock<T> block = block_of(unit, i);
          block.out = to_x ? to_x + p.inputs(unit) : nullptr;
          block.d_grad = to_grad ? to_grad + p.outputs(unit) : nullptr;
          kernels<T>().norm_second(block);
        });
    if (wants_weight)
      add_units(p, p.weight.lead, mutable_data<T>(d_weight[0]),
                [&](int64_t unit, int64_t c) { return of_affine.at(unit)[c]; });
    if (wants_bias)
      add_units(p, p.bias.lead, mutable_data<T>(d_bias[0]),
                [&](int64_t unit, int64_t c) { return of_affine.at(unit)[channels + c]; });
  });
  return {d_grad, dx, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("norm_moments", TORCH_BOX(&norm_moments));
  m.impl("norm_act_pool", TORCH_BOX(&norm_act_pool));
  m.impl("norm_act_pool_bwd", TORCH_BOX(&norm_act_pool_bwd));
  m.impl("norm_act_pool_bwd_bwd", TORCH_BOX(&norm_act_pool_bwd_bwd));
}

}  // namespace fastmeta::cpu

// Steps of optimisers on CUDA tensors: every parameter's tensors are handed over together, and all launched at once.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

using List = std::vector<Tensor>;

// An argument of a step: a tensor for each parameter, or where there are none a number for all.
struct Argument {
  const List& tensors;
  double number;
};

// What a step makes: for each parameter a tensor for all tasks (`like` null), or the gradient of an argument's.
struct Outcome {
  const List* like;
  bool wanted;
};

std::vector<List> step(const char* op, Step which, const std::vector<Argument>& arguments,
                       const std::vector<Outcome>& outcomes, StepFlags flags) {
  const List& params = arguments[0].tensors;
  std::vector<List> made(outcomes.size());
  if (params.empty()) return made;
  int64_t tasks = 1;
  for (const Argument& a : arguments) {
    STD_TORCH_CHECK(a.tensors.empty() || a.tensors.size() == params.size(), op,
                    ": needs a tensor per parameter in each list, or none");
    for (const Tensor& t : a.tensors) {
      check_tensor(op, params[0], t, 2);
      if (t.size(0) != 1) tasks = t.size(0);  // 0 too wins over 1
    }
  }
  // a gradient reads parameters for the sake of their decay alone
  const bool unread = outcomes[0].like && !flags.decays;
  double numbers[kStepOperands] = {};
  for (size_t k = 0; k < arguments.size(); ++k) numbers[k] = arguments[k].number;
  struct Sum {
    Tensor raw, out;
    bool over_rows, over_columns;
  };
  std::vector<Sum> sums;
  std::vector<StepTensor> tensors;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t columns = params[i].size(1);
    StepTensor t{};
    t.rows = tasks;
    t.columns = columns;
    for (size_t k = 0; k < arguments.size(); ++k) {
      if (arguments[k].tensors.empty() || (k == 0 && unread)) continue;
      const Tensor& from = arguments[k].tensors[i];
      STD_TORCH_CHECK((from.size(0) == tasks || from.size(0) == 1) && (from.size(1) == columns || from.size(1) == 1),
                      op, ": shape [", from.size(0), ", ", from.size(1), "] does not fit [", tasks, ", ", columns, "]");
      t.operands[k] = from.const_data_ptr();
      t.repeats_rows[k] = from.size(0) != tasks;
      t.repeats_columns[k] = from.size(1) != columns;
      if (tasks == 1) t.repeats_rows[k] = t.repeats_columns[k];  // so that one row is flat
      if (columns == 1) t.repeats_columns[k] = t.repeats_rows[k];
    }
    for (size_t k = 0; k < outcomes.size(); ++k) {
      const Outcome& o = outcomes[k];
      if (o.like ? o.like->empty() : !o.wanted) continue;
      if (!o.wanted) {
        made[k].push_back(new_tensor(params[i], {0}));
        continue;
      }
      Tensor out = o.like ? torch::stable::new_empty((*o.like)[i], (*o.like)[i].sizes())
                          : new_tensor(params[i], {tasks, columns});
      const bool over_rows = out.size(0) != tasks, over_columns = out.size(1) != columns;
      t.raw[k] = over_rows || over_columns;
      Tensor to = t.raw[k] ? new_sums(params[i], tasks * columns) : out;
      t.results[k] = to.mutable_data_ptr();
      if (t.raw[k]) sums.push_back({to, out, over_rows, over_columns});
      made[k].push_back(out);
    }
    tensors.push_back(t);
  }
  const OnDevice device(params[0]);
  const Dtype dtype = dtype_of(op, params[0]);
  launch_step(dtype, which, tensors.data(), int64_t(tensors.size()), numbers, flags, device.stream);
  Tensor scratch = new_sums(params[0], sums.empty() ? 0 : tasks);
  for (Sum& sum : sums) {
    const int64_t columns = tasks ? sum.raw.size(0) / tasks : sum.out.size(1);
    launch_step_sum(dtype, sum.raw.const_data_ptr(), tasks, columns, sum.over_rows, sum.over_columns,
                    scratch.mutable_data_ptr(), sum.out.mutable_data_ptr(), device.stream);
  }
  device.check(op);
  return made;
}

template <size_t... I>
auto tuple_of(std::vector<List>&& lists, std::index_sequence<I...>) {
  return std::make_tuple(std::move(lists[I])...);
}

std::vector<Outcome> gradients(const std::vector<Argument>& arguments, int64_t needs) {
  std::vector<Outcome> outcomes;
  for (size_t k = 0; k < arguments.size(); ++k) outcomes.push_back({&arguments[k].tensors, bool(needs >> k & 1)});
  return outcomes;
}

std::tuple<List, List> sgd_step(List params, List grads, List buffers, List rates, List momenta, List shares,
                                List decays, double rate, double momentum, double share, double decay, bool nesterov,
                                bool keeps) {
  return tuple_of(step("sgd_step", Step::sgd,
                       {{params, 0}, {grads, 0}, {buffers, 0}, {rates, rate}, {momenta, momentum}, {shares, share},
                        {decays, decay}},
                       {{nullptr, true}, {nullptr, keeps}}, {nesterov, keeps, !decays.empty() || decay != 0}),
                  std::make_index_sequence<2>());
}

std::tuple<List, List, List, List, List, List, List> sgd_step_bwd(List grad_0, List grad_1, List params, List grads,
                                                                  List buffers, List rates, List momenta, List shares,
                                                                  List decays, double rate, double momentum,
                                                                  double share, double decay, bool nesterov,
                                                                  bool keeps, int64_t needs) {
  std::vector<Argument> arguments = {{params, 0},         {grads, 0},      {buffers, 0},   {rates, rate},
                                     {momenta, momentum}, {shares, share}, {decays, decay}};
  const std::vector<Outcome> outcomes = gradients(arguments, needs);
  arguments.push_back({grad_0, 0});
  arguments.push_back({grad_1, 0});
  return tuple_of(step("sgd_step_bwd", Step::sgd_gradient, arguments, outcomes,
                       {nesterov, keeps, !decays.empty() || decay != 0}),
                  std::make_index_sequence<7>());
}

constexpr double kNone = -1;  // a maximum before the first: less than every square

std::tuple<List, List, List, List> adam_step(List params, List grads, List means, List squares, List maxima, List rates,
                                             List shares1, List shares2, List epsilons, List decays, double rate,
                                             double share1, double share2, double eps, double decay, bool decoupled,
                                             bool amsgrad) {
  return tuple_of(step("adam_step", Step::adam,
                       {{params, 0}, {grads, 0}, {means, 0}, {squares, 0}, {maxima, kNone}, {rates, rate},
                        {shares1, share1}, {shares2, share2}, {epsilons, eps}, {decays, decay}},
                       {{nullptr, true}, {nullptr, true}, {nullptr, true}, {nullptr, amsgrad}},
                       {decoupled, amsgrad, !decays.empty() || decay != 0}),
                  std::make_index_sequence<4>());
}

std::tuple<List, List, List, List, List, List, List, List, List, List> adam_step_bwd(
    List grad_0, List grad_1, List grad_2, List grad_3, List params, List grads, List means, List squares, List maxima,
    List rates, List shares1, List shares2, List epsilons, List decays, double rate, double share1, double share2,
    double eps, double decay, bool decoupled, bool amsgrad, int64_t needs) {
  std::vector<Argument> arguments = {{params, 0},   {grads, 0},        {means, 0},        {squares, 0},
                                     {maxima, kNone}, {rates, rate},   {shares1, share1}, {shares2, share2},
                                     {epsilons, eps}, {decays, decay}};
  const std::vector<Outcome> outcomes = gradients(arguments, needs);
  for (const List* grad : {&grad_0, &grad_1, &grad_2, &grad_3}) arguments.push_back({*grad, 0});
  return tuple_of(step("adam_step_bwd", Step::adam_gradient, arguments, outcomes,
                       {decoupled, amsgrad, !decays.empty() || decay != 0}),
                  std::make_index_sequence<10>());
}

}  // namespace

FM_LIBRARY {
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
  m.impl("sgd_step_bwd", TORCH_BOX(&sgd_step_bwd));
  m.impl("adam_step", TORCH_BOX(&adam_step));
  m.impl("adam_step_bwd", TORCH_BOX(&adam_step_bwd));
}

}  // namespace fastmeta::cuda

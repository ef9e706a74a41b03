// Steps of optimisers on CPU tensors: all tensors cut into blocks of like size, one parallel loop over the blocks.
#include "blocks.h"

namespace fastmeta::cpu {
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

struct Flags {
  bool first, second, decays;
};

// `pick` takes the kernel from the table of a scalar type.
template <class Pick>
std::vector<List> step(const char* op, const std::vector<Argument>& arguments, const std::vector<Outcome>& outcomes,
                       Flags flags, const Pick& pick) {
  const List& params = arguments[0].tensors;
  std::vector<const List*> lists;
  for (const Argument& a : arguments) {
    STD_TORCH_CHECK(a.tensors.empty() || a.tensors.size() == params.size(), op,
                    ": needs a tensor per parameter in each list, or none");
    lists.push_back(&a.tensors);
  }
  std::vector<List> made(outcomes.size());
  if (params.empty()) return made;
  const int64_t tasks = leading_size(op, lists);
  // a gradient reads parameters for the sake of their decay alone
  const bool unread = outcomes[0].like && !flags.decays;
  by_dtype(op, params[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> numbers;
    for (const Argument& a : arguments) numbers.push_back(T(a.number));
    std::vector<StepItem<T>> items;
    std::vector<Destination<T>> split;
    for (size_t i = 0; i < params.size(); ++i) {
      std::vector<Matrix> matrices;
      for (const Argument& a : arguments)
        matrices.push_back(a.tensors.empty() ? Matrix{1, 1} : matrix(a.tensors[i]));
      if (unread && !outcomes[0].wanted) matrices[0] = {1, 1};
      const Grid grid(op, tasks, params[i].size(1), matrices);
      StepItem<T> item{};
      item.first_flag = flags.first, item.second_flag = flags.second, item.decays = flags.decays;
      for (size_t k = 0; k < arguments.size(); ++k) {
        const List& tensors = arguments[k].tensors;
        const bool number = tensors.empty() || (k == 0 && unread);
        const Shape shape = number ? Shape{} : grid.shape(matrices[k]);
        item.operands[k] = {number ? &numbers[k] : data<T>(tensors[i]), shape.row, shape.columns};
      }
      std::vector<Destination<T>> targets;
      for (size_t k = 0; k < outcomes.size(); ++k) {
        const Outcome& o = outcomes[k];
        if (o.like && o.like->empty()) {
          targets.emplace_back();
          continue;
        }
        const Tensor& like = o.like ? (*o.like)[i] : params[i];
        if (o.wanted)
          targets.emplace_back(o.like ? new_like(like, true) : new_tensor(like, {tasks, like.size(1)}), grid);
        else
          targets.emplace_back();
        if (o.wanted || o.like) made[k].push_back(o.wanted ? targets[k].tensor : new_tensor(like, {0}));
        item.results[k] = {nullptr, targets[k].shape.row, targets[k].shape.columns};
        if (targets[k].parts > 1) split.push_back(targets[k]);
      }
      for (int64_t r = 0; grid.columns && r < grid.rows; r += grid.row_block)
        for (int64_t c = 0; c < grid.columns; c += grid.column_block) {
          StepItem<T> block = item;
          for (size_t k = 0; k < arguments.size(); ++k)
            block.operands[k].data += r * item.operands[k].row + (item.operands[k].columns ? c : 0);
          for (size_t k = 0; k < outcomes.size(); ++k) block.results[k].data = targets[k].at(grid, r, c);
          block.rows = std::min(grid.row_block, grid.rows - r);
          block.columns = std::min(grid.column_block, grid.columns - c);
          items.push_back(block);
        }
    }
    parallel(int64_t(items.size()), items.empty() ? 0 : 4 * items[0].rows * items[0].columns,
             [&](int64_t i) { pick(kernels<T>())(items[size_t(i)]); });
    add_partials(split);
  });
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
  return tuple_of(step("sgd_step",
                       {{params, 0}, {grads, 0}, {buffers, 0}, {rates, rate}, {momenta, momentum}, {shares, share},
                        {decays, decay}},
                       {{nullptr, true}, {nullptr, keeps}}, {nesterov, keeps, !decays.empty() || decay != 0},
                       [](const auto& table) { return table.sgd_step; }),
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
  return tuple_of(step("sgd_step_bwd", arguments, outcomes, {nesterov, keeps, !decays.empty() || decay != 0},
                       [](const auto& table) { return table.sgd_step_gradient; }),
                  std::make_index_sequence<7>());
}

constexpr double kNone = -1;  // a maximum before the first: less than every square

std::tuple<List, List, List, List> adam_step(List params, List grads, List means, List squares, List maxima, List rates,
                                             List shares1, List shares2, List epsilons, List decays, double rate,
                                             double share1, double share2, double eps, double decay, bool decoupled,
                                             bool amsgrad) {
  return tuple_of(step("adam_step",
                       {{params, 0}, {grads, 0}, {means, 0}, {squares, 0}, {maxima, kNone}, {rates, rate},
                        {shares1, share1}, {shares2, share2}, {epsilons, eps}, {decays, decay}},
                       {{nullptr, true}, {nullptr, true}, {nullptr, true}, {nullptr, amsgrad}},
                       {decoupled, amsgrad, !decays.empty() || decay != 0},
                       [](const auto& table) { return table.adam_step; }),
                  std::make_index_sequence<4>());
}

std::tuple<List, List, List, List, List, List, List, List, List, List> adam_step_bwd(
    List grad_0, List grad_1, List grad_2, List grad_3, List params, List grads, List means, List squares, List maxima,
    List rates, List shares1, List shares2, List epsilons, List decays, double rate, double share1, double share2,
    double eps, double decay, bool decoupled, bool amsgrad, int64_t needs) {
  std::vector<Argument> arguments = {{params, 0},  {grads, 0},         {means, 0},         {squares, 0},    {maxima, kNone},
                                     {rates, rate}, {shares1, share1}, {shares2, share2}, {epsilons, eps}, {decays, decay}};
  const std::vector<Outcome> outcomes = gradients(arguments, needs);
  for (const List* grad : {&grad_0, &grad_1, &grad_2, &grad_3}) arguments.push_back({*grad, 0});
  return tuple_of(step("adam_step_bwd", arguments, outcomes, {decoupled, amsgrad, !decays.empty() || decay != 0},
                       [](const auto& table) { return table.adam_step_gradient; }),
                  std::make_index_sequence<10>());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
  m.impl("sgd_step_bwd", TORCH_BOX(&sgd_step_bwd));
  m.impl("adam_step", TORCH_BOX(&adam_step));
  m.impl("adam_step_bwd", TORCH_BOX(&adam_step_bwd));
}

}  // namespace fastmeta::cpu

// contrastive_loss on CPU tensors, split over blocks of rows: the same blocks for any number of threads, so the same sums.
#include "tensors.h"

#include <limits>

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "contrastive_loss";
constexpr int64_t kRows = 48;  // of a block; their scores against one tile's columns stay in the second-level cache

template <class T>
struct Problem {
  int64_t tasks, count, width, blocks;
  T scale;
  const T* embeddings;
  Tensor packed, log_sums;

  Problem(const Tensor& z, double temperature) : scale(T(1 / temperature)), embeddings(data<T>(z)) {
    tasks = z.size(0);
    count = z.size(1);
    width = z.size(2);
    blocks = (count + kRows - 1) / kRows;
    const int64_t tiles = (count + kContrastColumns - 1) / kContrastColumns;
    const int64_t room = tiles * kContrastColumns * width;  // of a task
    packed = new_tensor(z, {tasks * room});
    log_sums = new_tensor(z, {tasks * count});
    T* to = mutable_data<T>(packed);
    parallel(tasks * tiles, kContrastColumns * width, [&](int64_t i) {
      const int64_t t = i / tiles, j = i % tiles * kContrastColumns;
      kernels<T>().pack(std::min(kContrastColumns, count - j), width, embeddings + (t * count + j) * width, width,
                        to + t * room + j * width);
    });
  }

  ContrastItem<T> item(int64_t i) const {
    const int64_t t = i / blocks, begin = i % blocks * kRows, tiles = (count + kContrastColumns - 1) / kContrastColumns;
    ContrastItem<T> item{};
    item.embeddings = embeddings + t * count * width;
    item.packed = data<T>(packed) + t * tiles * kContrastColumns * width;
    item.count = count;
    item.width = width;
    item.begin = begin;
    item.end = std::min(count, begin + kRows);
    item.scale = scale;
    item.log_sums = mutable_data<T>(log_sums) + t * count;
    return item;
  }
  int64_t cost() const { return kRows * count * (width + 16); }

  void losses(T* mean) const {
    std::vector<T> sums(size_t(tasks * blocks));
    parallel(tasks * blocks, cost(), [&](int64_t i) {
      ContrastItem<T> block = item(i);
      block.loss = &sums[size_t(i)];
      kernels<T>().contrast(block);
    });
    for (int64_t t = 0; t < tasks; ++t) {
      T sum = 0;
      for (int64_t i = t * blocks; i < (t + 1) * blocks; ++i) sum += sums[size_t(i)];
      mean[t] = count ? sum / T(count) : std::numeric_limits<T>::quiet_NaN();
    }
  }

  // `grad` of each task's loss
  void gradient(Operand<T> grad, T* out) const {
    parallel(tasks * blocks, 2 * cost(), [&](int64_t i) {
      ContrastItem<T> block = item(i);
      const int64_t t = i / blocks;
      block.factor = grad.base[t * grad.step] * scale / T(count);
      block.d_embeddings = out + t * count * width;
      kernels<T>().contrast_gradient(block);
    });
  }
};

Tensor contrastive_loss(Tensor embeddings, double temperature) {
  check_dims(kOp, embeddings, 3);
  Tensor loss = new_tensor(embeddings, {embeddings.size(0)});
  by_dtype(kOp, embeddings, [&](auto zero) {
    using T = decltype(zero);
    Problem<T>(embeddings, temperature).losses(mutable_data<T>(loss));
  });
  return loss;
}

Tensor contrastive_loss_bwd(Tensor grad, Tensor embeddings, double temperature, int64_t needs) {
  check_dims(kOp, embeddings, 3);
  Tensor out = new_like(embeddings, needs & 1);
  if (!(needs & 1)) return out;
  by_dtype(kOp, embeddings, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(embeddings, temperature);
    std::vector<T> losses(size_t(problem.tasks));
    problem.losses(losses.data());
    problem.gradient(of_tasks<T>(kOp, grad, problem.tasks, embeddings), mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> contrastive_loss_with_gradient(Tensor embeddings, double temperature, Tensor scale,
                                                          int64_t needs) {
  check_dims(kOp, embeddings, 3);
  Tensor loss = new_tensor(embeddings, {embeddings.size(0)}), out = new_like(embeddings, needs & 1);
  by_dtype(kOp, embeddings, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(embeddings, temperature);
    problem.losses(mutable_data<T>(loss));
    if (needs & 1) problem.gradient(of_tasks<T>(kOp, scale, problem.tasks, embeddings), mutable_data<T>(out));
  });
  return {loss, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("contrastive_loss", TORCH_BOX(&contrastive_loss));
  m.impl("contrastive_loss_bwd", TORCH_BOX(&contrastive_loss_bwd));
  m.impl("contrastive_loss_with_gradient", TORCH_BOX(&contrastive_loss_with_gradient));
}

}  // namespace fastmeta::cpu

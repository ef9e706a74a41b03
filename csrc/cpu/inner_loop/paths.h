// The loss that couples the rows of a task: maximum-entropy inverse reinforcement learning (Ziebart et al. 2008), its
// partition function estimated from sampled trajectories (Finn, Levine and Abbeel 2016).
//
// A row's output is the reward of a state. A trajectory's return is the sum of its states' rewards less its log q; each
// demonstration comes first of its members, before its samples:
//   loss = mean over demonstrations of  log(mean over samples of exp(return)) - return of the demonstration
#pragma once

#include <fastmeta/vmath.h>

#include "operands.h"
#include "gemm.h"

namespace fastmeta::FASTMETA_ISA {

// Rewards of rows `ld` apart, times their weights, summed along every trajectory.
template <class T>
void path_sums(const cpu::Paths& paths, const T* target, int64_t rows, const T* reward, int64_t ld, const T* weight,
               T* sums) {
  const int64_t count = paths.count();
  if (!paths.visits) {
    const int64_t horizon = rows / larger(1, count);
    for (int64_t j = 0; j < count; ++j) {
      T sum = 0;
      for (int64_t h = 0; h < horizon; ++h, reward += ld) sum += *reward * *weight++;
      sums[j] = sum;
    }
    return;
  }
  fill_zero(sums, count);
  for (int64_t s = 0; s + 1 < rows; ++s, target += count) {
    const T r = reward[s * ld] * weight[s];
    for (int64_t j = 0; j < count; j += kWidth<T>) {
      const int64_t n = smaller(kWidth<T>, count - j);
      store_first(sums + j, load_first(sums + j, n) + r * load_first(target + j, n), n);
    }
  }
}

// What every row gets of the trajectories' `sums`: the transpose of `path_sums`. Zero in the padding.
template <class T>
void path_shares(const cpu::Paths& paths, const T* target, int64_t rows, const T* sums, const T* weight, int64_t ld,
                 T* out) {
  const int64_t count = paths.count();
  fill_zero(out, rows * ld);
  if (!paths.visits) {
    const int64_t horizon = rows / larger(1, count);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t h = 0; h < horizon; ++h, out += ld) *out = sums[j] * *weight++;
    return;
  }
  for (int64_t s = 0; s + 1 < rows; ++s, target += count) {
    Vec<T> total = {};
    for (int64_t j = 0; j < count; j += kWidth<T>) {
      const int64_t n = smaller(kWidth<T>, count - j);
      total += load_first(sums + j, n) * load_first(target + j, n);
    }
    out[s * ld] = weight[s] * lane_sum<T>(total);
  }
}

// The loss; its gradient at the rewards times `scale` to `delta`, and each trajectory's share to `curvature`, where
// they are wanted. `room` holds twice the trajectories, each half padded to whole vectors.
template <class T>
T path_loss(const cpu::Paths& paths, const T* target, int64_t rows, const T* reward, int64_t ld, const T* weight,
            T scale, T* delta, T* curvature, T* room) {
  const int64_t count = paths.count(), members = paths.members, samples = members - 1;
  T *returns = room, *shares = room + padded<T>(count);
  path_sums(paths, target, rows, reward, ld, weight, returns);
  const T* log_q = paths.visits ? target + (rows - 1) * count : target;
  for (int64_t j = 0; j < count; ++j) returns[j] -= log_q[j];
  const T mean = T(1) / T(paths.demonstrations);
  T total = 0;
  for (int64_t first = 0; first < count; first += members) {
    const T* sampled = returns + first + 1;
    T most = -T(__builtin_inff()), sum = 0;
    for (int64_t m = 0; m < samples; ++m) most = sampled[m] > most ? sampled[m] : most;
    for (int64_t m = 0; m < samples; m += kWidth<T>) {
      const int64_t n = smaller(kWidth<T>, samples - m);
      const Vec<T> e = exponential<T>(load_first(sampled + m, n) - most);
      store_first(shares + first + 1 + m, e, n);
      for (int64_t i = 0; i < n; ++i) sum += e[i];
    }
    total += mean * (T(logarithm(broadcast(sum / T(samples)))[0]) + most - returns[first]);
    shares[first] = 0;
    for (int64_t m = 1; m < members; ++m) shares[first + m] *= mean / sum;
  }
  if (curvature) memcpy(curvature, shares, size_t(count) * sizeof(T));
  if (!delta) return total;
  for (int64_t j = 0; j < count; ++j) shares[j] *= scale;
  for (int64_t first = 0; first < count; first += members) shares[first] = -mean * scale;
  path_shares(paths, target, rows, shares, weight, ld, delta);
  return total;
}

// The loss's Hessian times the rewards' tangents, in place; `curvature` as `path_loss` leaves it.
template <class T>
void times_path_curvature(const cpu::Paths& paths, const T* target, int64_t rows, int64_t ld, const T* curvature,
                          const T* weight, T* dot, T* room) {
  const int64_t count = paths.count();
  path_sums(paths, target, rows, dot, ld, weight, room);
  for (int64_t first = 0; first < count; first += paths.members) {
    T mean = 0;
    for (int64_t m = 0; m < paths.members; ++m) mean += curvature[first + m] * room[first + m];
    mean *= T(paths.demonstrations);  // the shares of one demonstration sum to 1 / demonstrations
    for (int64_t m = 0; m < paths.members; ++m) room[first + m] = curvature[first + m] * (room[first + m] - mean);
  }
  path_shares(paths, target, rows, room, weight, ld, dot);
}

}  // namespace fastmeta::FASTMETA_ISA

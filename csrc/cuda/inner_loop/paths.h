// The loss that couples the rows of a task, by all threads of a block: maximum-entropy inverse reinforcement learning,
// its partition function estimated from sampled trajectories (csrc/cpu/inner_loop/paths.h has the formula).
#pragma once

#include "layout.h"
#include "products.h"

#include <fastmeta/launch_inner_loop.h>

namespace fastmeta::cuda {

// One task's: rows of rewards or of their gradients are column 0 of [rows, ld].
template <class A>
struct Trajectories {
  Team team;
  InnerPaths paths;
  int rows;
  const A* target;
  const A* weight;
  A* room;  // twice as many as trajectories, each half a whole number of four

  __device__ __forceinline__ Trajectories(Team team, const InnerRows& all, int task, A* room)
      : team(team),
        paths(all.paths),
        rows(all.rows),
        target(static_cast<const A*>(all.target) + int64_t(task) * paths.count * (paths.visits ? rows : 1)),
        weight(static_cast<const A*>(all.weight) + int64_t(task) * rows),
        room(room) {}

  __device__ __forceinline__ int horizon() const { return rows / paths.count; }
  __device__ __forceinline__ A* returns() const { return room; }
  __device__ __forceinline__ A* shares() const { return room + whole(paths.count); }

  // Weighted rewards summed along every trajectory, less its log q where wanted.
  __device__ __forceinline__ void sum_up(const A* reward, int ld, bool less_log_q) const {
    const int count = paths.count;
    for (int j = team.id; j < count; j += team.threads) {
      const A* log_q = target + (paths.visits ? (rows - 1) * count : 0);
      A sum = less_log_q ? -log_q[j] : A(0);
      if (paths.visits)
        for (int s = 0; s + 1 < rows; ++s) sum += reward[s * ld] * weight[s] * target[s * count + j];
      else
        for (int s = j * horizon(); s < (j + 1) * horizon(); ++s) sum += reward[s * ld] * weight[s];
      returns()[j] = sum;
    }
    __syncthreads();
  }

  // What every row gets of its trajectories' shares, times `scale`, plus `extra` where given; zero up to `padded`.
  __device__ __forceinline__ void share_out(A scale, const A* extra, A* out, int ld, int padded) const {
    const int count = paths.count;
    for (int s = team.id; s < rows; s += team.threads) {
      A sum = 0;
      if (!paths.visits)
        sum = shares()[s / horizon()];
      else if (s + 1 < rows)
        for (int j = 0; j < count; ++j) sum += target[s * count + j] * shares()[j];
      out[s * ld] = scale * weight[s] * sum + (extra ? extra[s] : A(0));
      for (int c = 1; c < padded; ++c) out[s * ld + c] = A(0);
    }
  }

  // This thread's part of the loss; with `gradient` that of the rewards takes their place, and `curve` is filled where
  // given.
  __device__ __forceinline__ A loss(A* reward, int ld, int padded, bool gradient, A scale, A* curve,
                                    const A* extra) const {
    sum_up(reward, ld, true);
    const int members = paths.members;
    const A mean = A(1) / A(paths.demonstrations);
    A total = 0;
    for (int d = team.id; d < paths.demonstrations; d += team.threads) {
      const A* own = returns() + d * members;
      A* share = shares() + d * members;
      A most = -A(INFINITY), sum = 0;
      for (int m = 1; m < members; ++m) most = own[m] > most ? own[m] : most;
      for (int m = 1; m < members; ++m) sum += share[m] = exp(own[m] - most);
      total += mean * (log(sum / A(members - 1)) + most - own[0]);
      share[0] = -mean;
      for (int m = 1; m < members; ++m) share[m] *= mean / sum;
      for (int m = 0; curve && m < members; ++m) curve[d * members + m] = m > 0 ? share[m] : A(0);
    }
    __syncthreads();
    if (gradient) share_out(scale, extra, reward, ld, padded);
    return total;
  }

  // The loss's Hessian times the rewards' tangents, in place.
  __device__ __forceinline__ void times_curvature(const A* curve, A* dot, int ld, int padded) const {
    sum_up(dot, ld, false);
    const int members = paths.members;
    for (int d = team.id; d < paths.demonstrations; d += team.threads) {
      const A *own = returns() + d * members, *part = curve + d * members;
      A mean = 0;  // the parts of one demonstration sum to 1 / demonstrations
      for (int m = 0; m < members; ++m) mean += part[m] * own[m];
      mean *= A(paths.demonstrations);
      for (int m = 0; m < members; ++m) shares()[d * members + m] = part[m] * (own[m] - mean);
    }
    __syncthreads();
    share_out(A(1), nullptr, dot, ld, padded);
  }
};

}  // namespace fastmeta::cuda

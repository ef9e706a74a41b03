// Mean and variance of each unit's channels or groups of them. Blocks find sums, and squares about their own means, of
// pieces of the pixels; a second kernel puts these together about the mean of all, so that no offset cancels.
#pragma once

#include "../column_sums.h"
#include "pieces.h"

namespace fastmeta::cuda {

// How many pixels a thread holds at once.
constexpr int kMomentsEach = 8;

// partial [units, pieces, 2, channels]
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows, 3) moments_kernel(NormMoments p, Pieces pieces) {
  using A = Acc<T>;
  __shared__ A parts[kSumRows][kSumColumns];
  __shared__ A means[kSumColumns];
  const int lane = int(threadIdx.x) % kSumColumns, across = int(threadIdx.x) / kSumColumns;
  FM_EACH(unit, x, p.units) FM_EACH(piece, y, pieces.count)
  FM_EACH(tile, z, divide_up<int64_t>(p.channels, kSumColumns)) {
    const int64_t channel = tile * kSumColumns + lane;
    const int64_t first = piece * pieces.length, end = smaller(p.pixels, first + pieces.length);
    const T* x = static_cast<const T*>(p.x) + unit * p.pixels * p.channels + channel;
    A count = 0, sum = 0, squares = 0;
    for (int64_t pixel = first + across; pixel < end && channel < p.channels; pixel += kMomentsEach * kSumRows) {
      const int64_t left = divide_up<int64_t>(end - pixel, kSumRows);
      const A n = A(smaller<int64_t>(left, kMomentsEach));
      A v[kMomentsEach], more = 0, about = 0;
#pragma unroll
      for (int i = 0; i < kMomentsEach; ++i) {
        v[i] = i < left ? load(x + (pixel + i * kSumRows) * p.channels) : A(0);
        more += v[i];
      }
      const A mean = more / n, apart = count > 0 ? mean - sum / count : A(0);
#pragma unroll
      for (int i = 0; i < kMomentsEach; ++i) about += i < left ? (v[i] - mean) * (v[i] - mean) : A(0);
      squares += about + apart * apart * (count * n / (count + n));
      sum += more;
      count += n;
    }
    const A all = add_rows(parts, sum);
    if (across == 0) means[lane] = all / A(end - first);
    __syncthreads();
    const A apart = count > 0 ? sum / count - means[lane] : A(0);
    const A about = add_rows(parts, squares + apart * apart * count);
    if (across > 0 || channel >= p.channels) continue;
    A* to = static_cast<A*>(p.scratch) + (unit * pieces.count + piece) * 2 * p.channels + channel;
    to[0] = all;
    to[p.channels] = about;
  }
}

// A column of threads owns a group and goes through the pieces of its channels, eight at once.
template <class A>
__global__ void __launch_bounds__(kSumColumns* kSumRows, 4) gather_moments_kernel(NormMoments p, Pieces pieces) {
  __shared__ A parts[kSumRows][kSumColumns];
  __shared__ A means[kSumColumns];
  const int lane = int(threadIdx.x) % kSumColumns, across = int(threadIdx.x) / kSumColumns;
  const int64_t each = p.channels / p.groups;
  FM_EACH(unit, x, p.units) FM_EACH(tile, y, divide_up<int64_t>(p.groups, kSumColumns)) {
    const int64_t group = tile * kSumColumns + lane, count_of_parts = group < p.groups ? pieces.count * each : 0;
    const A* partial = static_cast<const A*>(p.scratch) + unit * pieces.count * 2 * p.channels + group * each;
    const A count = A(p.pixels * each);
    A sum = 0, squares = 0;
    for (int64_t i = across; i < count_of_parts; i += kSumRows) sum += partial[i / each * 2 * p.channels + i % each];
    sum = add_rows(parts, sum);
    if (across == 0) means[lane] = sum / count;
    __syncthreads();
    const A mean = means[lane];
    for (int64_t i = across; i < count_of_parts; i += kSumRows) {
      const int64_t piece = i / each, pixels = smaller(pieces.length, p.pixels - piece * pieces.length);
      const A* of_piece = partial + piece * 2 * p.channels + i % each;
      const A apart = pixels > 0 ? of_piece[0] / A(pixels) - mean : A(0);
      squares += of_piece[p.channels] + apart * apart * A(pixels);
    }
    squares = add_rows(parts, squares);
    if (across > 0 || group >= p.groups) continue;
    static_cast<A*>(p.mean)[unit * p.groups + group] = mean;
    static_cast<A*>(p.var)[unit * p.groups + group] = squares / count;
  }
}

template <class T>
void launch_moments(const NormMoments& p, void* stream) {
  const Pieces pieces = pieces_of(p.pixels);
  const Grid grid{p.units, pieces.count, divide_up<int64_t>(p.channels, kSumColumns)};
  launch(moments_kernel<T>, grid, kSumColumns * kSumRows, 0, stream, p, pieces);
  launch(gather_moments_kernel<Acc<T>>, {p.units, divide_up<int64_t>(p.groups, kSumColumns)}, kSumColumns * kSumRows, 0,
         stream, p, pieces);
}

}  // namespace fastmeta::cuda

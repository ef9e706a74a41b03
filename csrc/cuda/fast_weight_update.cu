// out = addend - a * b over many tensors: the update itself, and its gradients with their sums.
#include "column_sums.h"

namespace fastmeta::cuda {
namespace {

constexpr int kThreads = 256, kEach = 4, kBlock = kThreads * kEach;
constexpr int kCapacity = 32;  // what fits into the 4 KiB of a kernel's arguments

template <class T>
__device__ __forceinline__ Acc<T> element(const Strided& s, int64_t row, int64_t column) {
  return load(static_cast<const T*>(s.data) + row * s.row + column * s.column);
}
template <class T>
__device__ __forceinline__ Acc<T> product(const Product& p, Acc<T> number, int64_t row, int64_t column) {
  return element<T>(p.a, row, column) * (p.b.data ? element<T>(p.b, row, column) : number);
}

struct Batch {
  Product products[kCapacity];
  int64_t first_block[kCapacity + 1];  // product i has the blocks from first_block[i] to first_block[i + 1]
  double inverse[kCapacity];           // 1 / columns
  int count;
};
static_assert(sizeof(Batch) <= 4000, "a kernel takes 4 KiB of arguments");

// Row and column of an element without a 64-bit division: the quotient is off by one at most below 2^53.
__device__ __forceinline__ int64_t row_of(int64_t index, int64_t columns, double inverse) {
  int64_t row = int64_t(double(index) * inverse);
  if (row * columns > index) --row;
  if ((row + 1) * columns <= index) ++row;
  return row;
}

template <class T>
__global__ void __launch_bounds__(kThreads) products_kernel(Batch batch, double number) {
  FM_EACH(block, x, batch.first_block[batch.count]) {
    int i = 0;
    while (block >= batch.first_block[i + 1]) ++i;
    const Product& p = batch.products[i];
    const int64_t start = (block - batch.first_block[i]) * kBlock + threadIdx.x, size = p.rows * p.columns;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t index = start + j * kThreads;
      if (index >= size) continue;
      const int64_t row = p.rows == 1 ? 0 : row_of(index, p.columns, batch.inverse[i]);
      const int64_t column = index - row * p.columns;
      const Acc<T> addend = p.addend.data ? element<T>(p.addend, row, column) : Acc<T>(0);
      store(static_cast<T*>(p.out) + index, addend - product<T>(p, Acc<T>(number), row, column));
    }
  }
}

// sums[g, column] = -sum of the rows of group g
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows, 4)
    sum_rows_kernel(Product p, double number, int64_t length, Acc<T>* sums) {
  __shared__ Acc<T> parts[kSumRows][kSumColumns];
  const int lane = int(threadIdx.x) % kSumColumns, across = int(threadIdx.x) / kSumColumns;
  FM_EACH(tile, x, divide_up<int64_t>(p.columns, kSumColumns))
  FM_EACH(group, y, p.rows > 0 ? divide_up(p.rows, length) : 1) {
    const int64_t column = tile * kSumColumns + lane, end = smaller(p.rows, (group + 1) * length);
    Acc<T> sum = 0;
    if (column < p.columns)
      for (int64_t row = group * length + across; row < end; row += kSumRows)
        sum -= product<T>(p, Acc<T>(number), row, column);
    sum = add_rows(parts, sum);
    if (across == 0 && column < p.columns) sums[group * p.columns + column] = sum;
  }
}

// out[u] = -sum over all columns of `length` rows from u * length
template <class T, class Out>
__global__ void __launch_bounds__(kThreads) sum_columns_kernel(Product p, double number, int64_t length, Out* out) {
  __shared__ Acc<T> parts[kThreads];
  FM_EACH(unit, x, divide_up(p.rows, length)) {
    const int64_t end = smaller(p.rows, (unit + 1) * length);
    Acc<T> sum = 0;
    for (int64_t row = unit * length; row < end; ++row)
      for (int64_t column = threadIdx.x; column < p.columns; column += kThreads)
        sum -= product<T>(p, Acc<T>(number), row, column);
    __syncthreads();
    parts[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) store(out + unit, parts[0]);
  }
}

// One launch a tensor: sums are wanted for learned learning rates and shared gradients alone.
template <class T>
void launch_sum(const Product& p, double number, void* scratch, void* stream) {
  using A = Acc<T>;
  const int64_t length = sum_length(p.rows), groups = sum_count(p.rows);
  A* sums = static_cast<A*>(scratch);
  if (p.reduce == Reduce::columns)
    return launch(sum_columns_kernel<T, T>, {p.rows}, kThreads, 0, stream, p, number, int64_t(1),
                  static_cast<T*>(p.out));
  if (p.reduce == Reduce::rows) {
    launch(sum_rows_kernel<T>, {divide_up<int64_t>(p.columns, kSumColumns), groups}, kSumColumns * kSumRows, 0, stream,
           p, number, length, sums);
    return launch_add_groups<T>(sums, 1, groups, p.columns, p.out, stream);
  }
  launch(sum_columns_kernel<T, A>, {p.rows > 0 ? groups : 0}, kThreads, 0, stream, p, number, length, sums);
  launch_add_groups<T>(sums, 1, p.rows > 0 ? groups : 0, 1, p.out, stream);
}

// Tasks and columns are one long row where every operand is whole or a single number.
Product flattened(Product p) {
  const auto flat = [&](const Strided& s) {
    return !s.data || (s.row == p.columns && s.column == 1) || (s.row == 0 && s.column == 0);
  };
  if (p.rows == 1 || !flat(p.addend) || !flat(p.a) || !flat(p.b)) return p;
  p.columns *= p.rows;
  p.rows = 1;
  return p;
}

}  // namespace

void launch_products(Dtype dtype, const Product* products, int64_t count, double number, void* scratch, void* stream) {
  by_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Batch batch{};
    const auto flush = [&] {
      launch(products_kernel<T>, {batch.first_block[batch.count]}, kThreads, 0, stream, batch, number);
      batch.count = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      if (products[i].reduce != Reduce::none) {
        launch_sum<T>(products[i], number, scratch, stream);
        continue;
      }
      const Product p = flattened(products[i]);
      if (p.rows * p.columns == 0) continue;
      if (batch.count == kCapacity) flush();
      batch.products[batch.count] = p;
      batch.inverse[batch.count] = 1.0 / double(p.columns);
      batch.first_block[batch.count + 1] =
          batch.first_block[batch.count] + divide_up<int64_t>(p.rows * p.columns, kBlock);
      ++batch.count;
    }
    flush();
  });
}

}  // namespace fastmeta::cuda

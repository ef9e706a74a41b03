// Tensors of all tasks as rows by columns, cut into blocks of like size: what steps over many tensors are made of.
#pragma once

#include "tensors.h"

#include <cstring>
#include <utility>

namespace fastmeta::cpu {

constexpr int64_t kBlockElements = 1 << 15;
constexpr int64_t kBlockColumns = 1 << 12;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t leading_size(const char* op, const std::vector<const std::vector<Tensor>*>& lists) {
  int64_t tasks = 1;
  for (const auto* list : lists)
    for (const Tensor& t : *list) {
      check_dims(op, t, 2);
      if (t.size(0) != 1) tasks = t.size(0);
    }
  return tasks;
}

// What an operand is read as.
struct Matrix {
  int64_t rows, columns;
  int64_t numel() const { return rows * columns; }
};
inline Matrix matrix(const Tensor& t) { return {t.size(0), t.size(1)}; }

// How an operand repeats: row stride 0 for one row for all, `columns` false for one number for a whole row.
struct Shape {
  int64_t row = 0;
  bool columns = false;
};

// One tensor of all tasks as rows by columns, in blocks. Where every operand is either whole or a single number, tasks
// and columns are one long row.
struct Grid {
  int64_t rows, columns, row_block, column_block;
  bool flat = true;

  Grid(const char* op, int64_t tasks, int64_t n, const std::vector<Matrix>& operands) : rows(tasks), columns(n) {
    for (const Matrix& t : operands) {
      const bool whole = t.rows == tasks && t.columns == n, number = t.numel() == 1;
      flat = flat && (whole || number);
      STD_TORCH_CHECK((t.rows == tasks || t.rows == 1) && (t.columns == n || t.columns == 1), op, ": shape [", t.rows,
                      ", ", t.columns, "] does not fit [", tasks, ", ", n, "]");
    }
    if (flat) {
      rows = 1;
      columns = tasks * n;
    }
    column_block = std::max<int64_t>(1, std::min(columns, rows == 1 ? kBlockElements : kBlockColumns));
    row_block = std::max<int64_t>(1, kBlockElements / column_block);
  }

  Shape shape(const Matrix& t) const {
    if (flat) return {columns, t.numel() == columns};
    return {t.rows == 1 ? 0 : t.columns, t.columns == columns};
  }
  int64_t row_blocks() const { return columns ? divide_up(rows, row_block) : 0; }
  int64_t column_blocks() const { return divide_up(columns, column_block); }
};

// Where a gradient goes: straight to its tensor, or, where several blocks share an element, to one partial sum per
// block row or column, added up afterwards in order.
template <class T>
struct Destination {
  Tensor tensor, partials;
  T* out = nullptr;
  int64_t size = 0, parts = 1, column_blocks = 1;
  Shape shape;
  bool sum_rows = false;

  Destination() = default;
  Destination(Tensor to, const Grid& grid) : tensor(std::move(to)) {
    size = tensor.numel();
    shape = grid.shape(matrix(tensor));
    sum_rows = !grid.flat && tensor.size(0) == 1;
    column_blocks = shape.columns ? 1 : grid.column_blocks();
    parts = (sum_rows ? grid.row_blocks() : 1) * column_blocks;
    out = mutable_data<T>(tensor);
    if (parts > 1) {
      partials = new_tensor(tensor, {parts * size});
      out = mutable_data<T>(partials);
    } else if (grid.rows * grid.columns == 0 && size > 0) {
      std::memset(out, 0, size_t(size) * sizeof(T));
    }
  }
  T* at(const Grid& grid, int64_t r, int64_t c) const {
    if (out == nullptr) return nullptr;
    const int64_t part = (sum_rows ? r / grid.row_block * column_blocks : 0) + (shape.columns ? 0 : c / grid.column_block);
    return out + (parts > 1 ? part * size : 0) + r * shape.row + (shape.columns ? c : 0);
  }
};

template <class T>
void add_partials(const std::vector<Destination<T>>& targets) {
  for (const Destination<T>& target : targets) {
    constexpr int64_t kColumns = 1024;
    T* to = mutable_data<T>(target.tensor);
    parallel(divide_up(target.size, kColumns), target.parts * kColumns, [&](int64_t i) {
      const int64_t start = i * kColumns;
      kernels<T>().sum_partials(target.out + start, target.parts, target.size, to + start,
                                std::min(kColumns, target.size - start));
    });
  }
}

}  // namespace fastmeta::cpu

// class_prototypes on CPU tensors. Split over tasks, and over columns where tasks are few.
#include "tensors.h"

namespace fastmeta::cpu {
namespace {

constexpr const char* kOp = "class_prototypes";

// x: embeddings [T, S, D] or the gradient [T, N, D]; out the other way round
template <class T>
void run(void (*kernel)(const PrototypeItem<T>&), const Tensor& x, const Tensor& labels, const Tensor& out,
         int64_t classes) {
  const int64_t tasks = x.size(0), width = x.size(2), support = labels.size(1);
  const int64_t parts = row_parts(tasks, width, 256);
  const int64_t x_task = x.size(1) * width, out_task = out.size(1) * width;
  const T* from = data<T>(x);
  T* to = mutable_data<T>(out);
  const int64_t* label = data<int64_t>(labels);
  parallel(tasks * parts, support * width / parts, [&](int64_t i) {
    const int64_t t = i / parts;
    const Range columns = part(width, parts, i % parts);
    kernel({from + t * x_task + columns.begin, label + t * support, support, classes, columns.end - columns.begin,
            width, to + t * out_task + columns.begin});
  });
}

Tensor class_prototypes(Tensor embeddings, Tensor labels, int64_t num_classes) {
  check_dims(kOp, embeddings, 3);
  check_dims(kOp, labels, 2);
  Tensor out = new_tensor(embeddings, {embeddings.size(0), num_classes, embeddings.size(2)});
  by_dtype(kOp, embeddings, [&](auto zero) {
    using T = decltype(zero);
    run<T>(kernels<T>().prototypes, embeddings, labels, out, num_classes);
  });
  return out;
}

Tensor class_prototypes_bwd(Tensor grad, Tensor labels) {
  check_dims(kOp, grad, 3);
  check_dims(kOp, labels, 2);
  Tensor out = new_tensor(grad, {grad.size(0), labels.size(1), grad.size(2)});
  by_dtype(kOp, grad, [&](auto zero) {
    using T = decltype(zero);
    run<T>(kernels<T>().prototypes_gradient, grad, labels, out, grad.size(1));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastmeta_native, CPU, m) {
  m.impl("class_prototypes", TORCH_BOX(&class_prototypes));
  m.impl("class_prototypes_bwd", TORCH_BOX(&class_prototypes_bwd));
}

}  // namespace fastmeta::cpu

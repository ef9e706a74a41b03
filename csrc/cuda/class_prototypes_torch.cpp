// class_prototypes on CUDA tensors.
#include "bridge.h"

namespace fastmeta::cuda {
namespace {

constexpr const char* kOp = "class_prototypes";

Tensor class_prototypes(Tensor embeddings, Tensor labels, int64_t num_classes) {
  check_tensor(kOp, embeddings, embeddings, 3);
  const int64_t tasks = embeddings.size(0), support = embeddings.size(1), width = embeddings.size(2);
  const int64_t* label = labels_of(kOp, embeddings, labels, tasks);
  STD_TORCH_CHECK(labels.size(1) == support, kOp, ": ", labels.size(1), " labels for ", support, " rows");
  const OnDevice device(embeddings);
  Tensor out = new_tensor(embeddings, {tasks, num_classes, width});
  launch_class_prototypes(
      dtype_of(kOp, embeddings),
      {embeddings.const_data_ptr(), label, out.mutable_data_ptr(), tasks, support, num_classes, width}, device.stream);
  device.check(kOp);
  return out;
}

Tensor class_prototypes_bwd(Tensor grad, Tensor labels) {
  check_tensor(kOp, grad, grad, 3);
  const int64_t tasks = grad.size(0), classes = grad.size(1), width = grad.size(2);
  const int64_t* label = labels_of(kOp, grad, labels, tasks);
  const int64_t support = labels.size(1);
  const OnDevice device(grad);
  Tensor out = new_tensor(grad, {tasks, support, width});
  launch_class_prototypes_bwd(dtype_of(kOp, grad),
                              {grad.const_data_ptr(), label, out.mutable_data_ptr(), tasks, support, classes, width},
                              device.stream);
  device.check(kOp);
  return out;
}

}  // namespace

FM_LIBRARY {
  m.impl("class_prototypes", TORCH_BOX(&class_prototypes));
  m.impl("class_prototypes_bwd", TORCH_BOX(&class_prototypes_bwd));
}

}  // namespace fastmeta::cuda

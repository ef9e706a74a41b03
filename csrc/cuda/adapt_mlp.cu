// Fast weights of every task after the inner steps, and the gradient through all of them.
#include "inner_loop/launch.h"

namespace fastmeta::cuda {

InnerPlan plan_adapt_mlp(Dtype dtype, InnerLoop& p, bool backward) {
  return backward ? plan_inner_loop<false, true>(dtype, p) : plan_inner_loop<false, false>(dtype, p);
}
void launch_adapt_mlp(Dtype dtype, InnerLoop p, const InnerPlan& plan, bool backward, void* scratch, void* stream) {
  if (backward)
    launch_inner_loop<false, true>(dtype, p, plan, scratch, stream);
  else
    launch_inner_loop<false, false>(dtype, p, plan, scratch, stream);
}

}  // namespace fastmeta::cuda

// The table of one instruction set. Included last by csrc/cpu/isa_*.cpp.
#include "kernels.h"

#include "class_prototypes_kernel.h"
#include "contrastive_loss_kernel.h"
#include "conv/kernel.h"
#include "fast_weight_update_kernel.h"
#include "functional_mlp_kernel.h"
#include "functional_mlp_lanes.h"
#include "conv/moments.h"
#include "inner_loop/kernel.h"
#include "norm_act_pool_kernel.h"
#include "optimizer_steps_kernel.h"
#include "pairwise_distance_kernel.h"
#include "prototypical_loss_kernel.h"

namespace fastmeta {
namespace FASTMETA_ISA {

// parts [n] at from + i * part_stride, added up in order
template <class T>
void sum_partials(const T* from, int64_t parts, int64_t part_stride, T* to, int64_t n) {
  constexpr int W = kWidth<T>;
  for (int64_t j = 0; j < n; j += W) {
    const int64_t lanes = smaller(W, n - j);
    Vec<T> sum = {};
    for (int64_t i = 0; i < parts; ++i) sum += load_first(from + i * part_stride + j, lanes);
    store_first(to + j, sum, lanes);
  }
}

template <class T>
constexpr cpu::Kernels<T> table() {
  return {update<T>,
          update_gradient<T>,
          optimizer_step<T, SgdRule>,
          optimizer_step<T, SgdGradientRule>,
          optimizer_step<T, AdamRule<T>>,
          optimizer_step<T, AdamGradientRule<T>>,
          prototypes<T>,
          prototypes_gradient<T>,
          distances<T>,
          distances_gradient<T>,
          loss<T>,
          loss_gradient<T>,
          mlp<T>,
          mlp_gradient<T>,
          mlp_lanes<T>,
          mlp_pack<T>,
          contrast<T>,
          contrast_gradient<T>,
          pack_transposed<T>,
          sum_partials<T>,
          norm_moments<T>,
          norm_forward<T>,
          norm_sums<T>,
          norm_gradient<T>,
          norm_second_sums<T>,
          norm_second<T>,
          inner_loop<T>,
          inner_loop_gradient<T>,
          conv<T>,
          conv_weight<T>};
}

}  // namespace FASTMETA_ISA

#define FM_STRING(x) #x
#define FM_NAME(x) FM_STRING(x)
constinit const cpu::Isa cpu::FASTMETA_TABLE = {FM_NAME(FASTMETA_ISA), FASTMETA_ISA::table<float>(),
                                          FASTMETA_ISA::table<double>()};

}  // namespace fastmeta

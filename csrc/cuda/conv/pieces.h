// What each unit's pixels, or windows of them, are cut into for sums.
#pragma once

#include <fastmeta/launch_conv.h>

namespace fastmeta::cuda {

struct Pieces {
  int64_t count, length;
};
inline Pieces pieces_of(int64_t size) { return {sum_count(size), sum_length(size)}; }

}  // namespace fastmeta::cuda

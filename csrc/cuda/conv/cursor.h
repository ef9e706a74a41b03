// A place in a batch of images, moved on without divisions.
#pragma once

#include "../device.h"

namespace fastmeta::cuda {

struct Cursor {
  int64_t image;
  int i, j, high, wide;

  __device__ __forceinline__ Cursor(int64_t index, int64_t high, int64_t wide)
      : image(index / (high * wide)), high(int(high)), wide(int(wide)) {
    const int64_t rest = index - image * high * wide;
    i = int(rest / wide);
    j = int(rest - i * wide);
  }

  __device__ __forceinline__ void advance(int count) {
    j += count;
    while (j >= wide) {
      j -= wide;
      if (++i < high) continue;
      i = 0;
      ++image;
    }
  }
};

}  // namespace fastmeta::cuda
